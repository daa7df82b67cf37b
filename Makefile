PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run test lint bench clean

help:   ## show what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DONE)  ## make .venv and install the package with its development tools

$(DONE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed (found " + sys.version.split()[0] + "): make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $(DONE)

run: setup  ## train on the embedded Shakespeare for a few minutes, then sample from the result
	$(BIN)/gpt2 train
	$(BIN)/gpt2 sample --prompt "KING." --max-new-tokens 200

test: setup  ## run the tests
	$(BIN)/python -m pytest

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## time attention kernels, the training step and sampling on this machine
	$(BIN)/gpt2 bench attention
	$(BIN)/gpt2 bench train
	$(BIN)/gpt2 bench sample

clean:  ## remove the environment, caches and build output (never runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
