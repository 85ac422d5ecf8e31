# Every target sets up what it needs on first use; pip's options are its own PIP_* variables.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
USABLE := 'import sys, pip; sys.exit(sys.version_info < (3, 11))'

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format build clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.12 (for the set-up), ARGS=\"...\" (for demo and the tests)"

demo: $(STAMP)  ## Train and evaluate a small detector on the embedded data set
	$(BIN)/python train_det.py experiment=demo $(ARGS)

test: $(STAMP)  ## Run the tests, a process for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-slow: $(STAMP)  ## Run the tests marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(STAMP)  ## Check style, types and the floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)  ## Rewrite the code in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: $(STAMP)  ## Build the source archive and the wheel into dist/
	$(BIN)/python -m build

clean:  ## Remove builds and caches; keep .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Touched last, so that an interrupted set-up is redone. A working environment is kept.
$(STAMP): pyproject.toml
	@if ! $(BIN)/python -c $(USABLE) 2>/dev/null; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "error: $(PYTHON) is not Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: $(PYTHON) has no venv: apt install python3-venv" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "setting up $(VENV) (once; torch is large)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
