# `make` lists the targets. Everything runs in .venv, which `make install` makes and keeps true to constraints.txt.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The interpreter that makes the venv, and the one inside.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# A second package index to take torch from, such as the one with CPU or CUDA builds; empty: only the indexes pip knows.
TORCH_INDEX_URL ?=
# Twice quiet: a warning on each index without a package is no news.
PIP_FLAGS := --quiet --quiet --disable-pip-version-check --no-input $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

# 1: install only files whose hashes are in requirements/. torch is the CPU's build, or where none is found the default one.
REQUIRE_HASHES ?=
LOCKED := install $(PIP_FLAGS) --require-hashes --no-deps --only-binary=:all:

# Tests start many processes; one thread for each keeps them from fighting for the cores.
test soak mutations: export OMP_NUM_THREADS ?= 1
test soak mutations: export MKL_NUM_THREADS ?= 1
test soak mutations: export TOKENIZERS_PARALLELISM ?= false
# And they import the same modules: compiled once, also where the environment would have each of them compile anew.
test soak mutations: export PYTHONDONTWRITEBYTECODE :=
# Two at once, each file in one of them: more would start more clusters than cores and memory hold.
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
MUTATION_ARGS ?=

.PHONY: help install model demo test lint format protos sync-client lock pin-images reference benchmark-tables docs newcomer soak k8s mutations bench clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(INSTALLED) ## make .venv and install kvrelay with everything for development

# pip is told about torch's index only when there is one; the stamp is new once all of it went well.
$(INSTALLED): pyproject.toml constraints.txt $(if $(REQUIRE_HASHES),$(wildcard requirements/*.txt))
	@echo "installing into $(VENV) (minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(REQUIRE_HASHES),1)
	@$(BIN)/python -m pip $(LOCKED) $(addprefix --requirement requirements/,gateway.txt worker.txt dev.txt)
	@$(BIN)/python -m pip $(LOCKED) --requirement requirements/torch-cpu.txt || $(BIN)/python -m pip $(LOCKED) --requirement requirements/torch.txt
	@$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check
else
	@$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[all]'
endif
	@touch $@

model: install ## fetch and convert the demo model, once per machine
	@$(BIN)/python -m tools.prepare_demo_model

demo: install ## start a cluster, stream an answer, show the request's phases
	@$(BIN)/kvrelay demo

# Above pytest's last line stands what was left out, and how to have it.
test: lint model ## everything that CI checks; pytest's summary is the last line
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

lint: install docs ## ruff, mypy --strict, buf lint, generated code, documentation, prose
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "badly formatted files; run 'make format'"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/buf lint protos
	@$(BIN)/python -m tools.generate_protos --check
	@$(BIN)/python -m tools.generate_sync_client --check
	@$(BIN)/python -m tools.generate_reference --check
	@$(BIN)/python -m tools.generate_benchmarks --check
	@$(BIN)/python -m tools.check_prose
	@$(BIN)/python -m tools.lock_requirements --check

format: install ## format the code and fix what ruff can fix
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

reference: install ## generate the pages of docs/reference that list what the code declares
	@$(BIN)/python -m tools.generate_reference

benchmark-tables: install ## generate the tables of docs/benchmarks from the JSON documents there
	@$(BIN)/python -m tools.generate_benchmarks

protos: install ## generate kvrelay/v1 from protos/
	@$(BIN)/buf lint protos
	@$(BIN)/python -m tools.generate_protos

lock: install ## write the hashes of all pinned versions into requirements/ (asks the package index; needs uv)
	@$(BIN)/python -m tools.lock_requirements

pin-images: install ## pin images of others by digest (asks the registry; needs docker with buildx)
	@$(BIN)/python -m tools.pin_images

sync-client: install ## generate the blocking client from the asyncio one
	@$(BIN)/python -m tools.generate_sync_client

# Not with --quiet: then --strict does not see the warnings.
docs: install ## build the documentation's site into build/site, every link checked
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict >build/site.log 2>&1 || { cat build/site.log; exit 1; }

newcomer: ## what README and docs say, in new environments, as a newcomer does it
	@tools/newcomer.sh

soak: install model ## the tests that run for minutes
	@$(BIN)/python -m pytest -m soak --timeout 3600 $(PYTEST_ARGS)

k8s: install build/k8s/.fetched ## the tests of the Helm chart, with helm and the schemas of Kubernetes
	@$(BIN)/python -m pytest -m k8s --timeout 600 tests/project/test_helm_chart.py $(PYTEST_ARGS)

build/k8s/.fetched: tools/fetch_k8s_tools.sh
	@tools/fetch_k8s_tools.sh build/k8s
	@touch $@

mutations: install model ## take each guard out in turn and expect a test to fail, such as MUTATION_ARGS='-O -k key'; takes an hour
	@$(BIN)/python -m tests.all_mutations $(MUTATION_ARGS)

bench: install model ## run a benchmark, such as BENCH_ARGS='engine --quick'; without it, list them
	@$(BIN)/kvrelay bench $(or $(BENCH_ARGS),--help)

clean: ## remove .venv and all caches of tools; the model store stays
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
