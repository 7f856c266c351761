# `make help` lists the targets. Everything works from a fresh clone: the first target that needs it makes .venv.
.DEFAULT_GOAL := help
.PHONY: help run test check lint types contracts openapi openapi-check unit pooler demo bench bench-quick migrate format lock clean system-tools

PYTHON ?= python3
BIN := .venv/bin
# Two test processes on two cores; a test's own database keeps them apart.
JOBS ?= 2

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

run: .venv/.run ## Start leaseq with its own PostgreSQL (or DATABASE_URL), migrated and ready to take jobs
	@exec $(BIN)/python -m app serve

test: .venv/.dev system-tools check unit pooler ## Everything that must pass: lint, types, contracts, drift, tests

check: lint types contracts openapi-check ## All checks but the tests

lint: .venv/.dev ## Style and smells
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev ## Types, strictly
	$(BIN)/mypy

contracts: .venv/.dev ## Who may import whom
	$(BIN)/lint-imports --no-logo

openapi: .venv/.dev ## Write openapi.yaml from the routes
	$(BIN)/python -m app openapi

openapi-check: .venv/.dev ## Fail when openapi.yaml is not what the routes say
	$(BIN)/python -m app openapi --check

unit: .venv/.dev ## The tests alone
	$(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term

pooler: .venv/.dev system-tools ## The API's tests again, through PgBouncer in transaction mode
	LEASEQ_TEST_POOLER=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/api

MINUTES ?= 20
model: .venv/.dev ## Drive the service against the plain model with new steps, for MINUTES=20
	MODEL_MINUTES=$(MINUTES) $(BIN)/python -m pytest -q tests/system/test_model.py

demo: .venv/.dev ## Three workers in three languages digest a tree of files; one is killed on the way
	$(BIN)/python -m examples.demo

bench: .venv/.bench ## Measure leaseq beside its peers (an hour) and write docs/benchmarks.md
	$(BIN)/python -m benchmarks --write

bench-quick: .venv/.bench ## The same, coarsely, in less than three minutes
	$(BIN)/python -m benchmarks --quick

migrate: .venv/.run ## Bring the database's schema up to date
	$(BIN)/python -m app migrate

format: .venv/.dev ## Mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Extras stay in the names: pip looks for the newest `coverage[toml]` where only `coverage` is pinned, and refuses it.
lock: ## Renew the locked dependencies (needs uv)
	uv pip compile -q --upgrade --universal --python-version 3.11 --no-strip-extras --generate-hashes --no-header --extra embedded pyproject.toml -o requirements/run.txt
	uv pip compile -q --universal --python-version 3.11 --no-strip-extras --generate-hashes --no-header -c requirements/run.txt pyproject.toml -o requirements/service.txt
	uv pip compile -q --universal --python-version 3.11 --no-strip-extras --generate-hashes --no-header -c requirements/run.txt --all-extras pyproject.toml -o requirements/dev.txt
	uv pip compile -q --universal --python-version 3.11 --no-strip-extras --generate-hashes --no-header -c requirements/dev.txt --extra embedded pyproject.toml benchmarks/requirements.in -o requirements/bench.txt

clean: ## Remove what was made here, but not the data in .leaseq
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage*

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "leaseq needs Python 3.11 or newer; set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }

# A stamp says that exactly these locked packages are installed.
.venv/.run: requirements/run.txt | .venv/bin/python
	@echo "Installing the locked packages into .venv ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/run.txt
	@touch $@

.venv/.dev: requirements/dev.txt | .venv/bin/python
	@echo "Installing the locked packages into .venv ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch .venv/.run $@

# The shell worker of examples/ is tested too, and it needs the first two; the third is the pooler of `make pooler`.
TOOLS := jq curl pgbouncer
system-tools:
	@export PATH="$$PATH:/usr/sbin"; (for tool in $(TOOLS); do command -v $$tool || exit 1; done) >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(TOOLS) >/dev/null; } || { \
	  echo "The tests need $(TOOLS): install them with your package manager."; exit 1; }

.venv/.bench: requirements/bench.txt | .venv/bin/python
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/bench.txt
	@touch $@
