# One command a purpose; each sets up .venv by itself. The same ones run in CI (.ci/run).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CODE := common services studies benchmarks tests docs

# Beyond a plain machine: what these marks need, `make test-all` brings or asks for.
NOT_EVERYWHERE := slow or docker or browser or namespaces or peers

.PHONY: help demo dev format lint types test test-all bench docs

help:  ## Show this.
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: $(VENV)/.runnable  ## Watch a model learn while it serves, for a minute (ARGS="--seed 1"); writes demo-report/.
	$(BIN)/lemix demo $(ARGS)

dev: $(VENV)/.installed  ## Set up .venv with everything that development needs.

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]'
	@touch $@ $(VENV)/.runnable

# What `lemix` itself needs, without the tools of development, which bring it too.
$(VENV)/.runnable: pyproject.toml
	@echo 'Setting up $(VENV), with torch: some minutes, once.'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	@touch $@

format: dev  ## Format the code.
	$(BIN)/ruff check --fix --quiet --select I $(CODE)
	$(BIN)/ruff format $(CODE)

lint: dev  ## Format check and lint.
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

types: dev  ## mypy --strict.
	$(BIN)/mypy

test: dev  ## Tests that run everywhere: no root, no container, no browser; at most 5 minutes.
	$(BIN)/pytest -n 2 -m "not ($(NOT_EVERYWHERE))"

test-all: dev  ## All tests.
	$(BIN)/pytest

bench: dev  ## Benchmarks that this machine can run, as JSON.
	for name in hop prefill train decode tax; do $(BIN)/lemix bench $$name --json || exit; done

docs: dev  ## Write the pages that are made from the code.
	$(BIN)/python docs/generate.py
