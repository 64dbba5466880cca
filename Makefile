# The two commands are `make demo` and `make test`; `make` alone lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests also wait, for processes and deadlines: two workers more than there are cores.
WORKERS ?= $(shell echo $$((2 + $$(nproc 2>/dev/null || echo 2))))
# Files stay together, so that tests share services, and come in their order: the short ones of the core last, so that no
# worker ends late.
# A worker that died hangs pytest-xdist where it is replaced: units that are done are handed out again.
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
READY := $(VENV)/.ready
# Hundreds of short processes: where this is set, each would compile all it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup lock demo chaos soak test test-slow test-aws lint format bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv from requirements.lock (nothing to do when it is up to date)

$(READY): requirements.lock requirements.txt pyproject.toml .ci/setup
	@.ci/setup "$(PYTHON)" "$(VENV)"
	@touch $@

lock: $(READY) ## Resolve requirements.lock anew within the ranges
	$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 --no-header \
		--extra dev pyproject.toml -o requirements.lock
	@! grep -nE '://' requirements.lock

demo: $(READY) ## The runbook on an embedded Kafka or SQS in a real Airflow (EXIT=1 ends by itself, APPROVE=1 asks you, QUEUE=, PORT=)
	@$(BIN)/python -m dlq_demo $(if $(EXIT),--exit) $(if $(APPROVE),--approve) $(QUEUE:%=--queue %) $(PORT:%=--port %)

chaos: $(READY) ## Break everything around a drain and its workflows, in a real Airflow; assert full recovery (QUEUE=)
	@$(BIN)/python -m dlq_demo.chaos $(QUEUE:%=--queue %)

soak: $(READY) ## Load, faults and scheduled drains for so many minutes; count what is lost or doubled (MINUTES=3)
	@$(BIN)/python -m dlq_demo.soak $(MINUTES:%=--minutes %)

test: $(READY) ## Every test but the slow ones
	$(PYTEST) -m "not slow and not aws"

# Schedulers are killed and people have deadlines to answer by: those tests have the machine to themselves.
test-slow: $(READY) ## What takes long: processes and brokers killed by the dozen, people answering in a real Airflow
	$(PYTEST) -m "slow and not airflow"
	$(BIN)/pytest -m "slow and airflow"

test-aws: $(READY) ## A drain on your AWS account, of a test queue and its dead-letter queue (QUEUE=)
	QUEUE="$(QUEUE)" $(BIN)/pytest -m aws tests/aws

lint: $(READY) ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Sort imports, format, fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Measure intake, replay and proof beside the raw loops
	$(BIN)/python -m benchmarks

clean: ## Remove what was made here (.venv, run folders, caches); the jar cache in ~/.cache stays
	rm -rf $(VENV) .run .benchmarks dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
