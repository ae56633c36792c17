# Two commands do all of their own set-up in .venv: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test quick bench lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train through injected faults and prove the result identical (about two minutes)"
	@echo "make test    all tests this machine can run"
	@echo "make quick   the unit tests alone"
	@echo "make bench   benchmarks, as ratios against what runs beside them; writes benchmarks/RESULTS.md"
	@echo "make lint    ruff, mypy --strict, import-linter"

$(READY): pyproject.toml constraints.txt hatch_build.py runtime/outlast/snapshot/_kernel.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "outlast needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/bytelm/demo.py

test: $(READY)
	$(BIN)/python -m pytest tests/unit tests/contract tests/integration

quick: $(READY)
	$(BIN)/python -m pytest tests/unit

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache runtime/outlast/snapshot/_kernel.so
