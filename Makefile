# Two commands do all of their own set-up in .venv: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test quick bench lint format clean manifests golden e2e images
.DEFAULT_GOAL := help

help:
	@echo "make demo    train through injected faults and prove the result identical (about two minutes)"
	@echo "make test    all tests this machine can run"
	@echo "make quick   the unit tests alone"
	@echo "make bench   benchmarks, as ratios against what runs beside them; writes benchmarks/RESULTS.md"
	@echo "make lint    ruff, mypy --strict, import-linter"
	@echo "make manifests   the CRD out of outlast.api, the chart's copy, install.yaml out of the chart (needs helm)"
	@echo "make images  outlast-operator:dev and outlast-training:dev, with docker or the lab's builder"
	@echo "make e2e     end-to-end tests on the lab's Kubernetes: root, about 15 minutes"

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

# Helm, where it is not on PATH, is among the lab's binaries.
LAB = $(shell command -v kubelab || ls ../shared/kubelab/kubelab 2>/dev/null)
HELM = $(shell command -v helm || echo "$$($(LAB) assets)/helm")

manifests: $(READY)
	$(BIN)/python -m outlast_operator.crd > manifests/crd.yaml.new
	mv manifests/crd.yaml.new manifests/crd.yaml
	cp manifests/crd.yaml charts/outlast/files/crd.yaml
	$(BIN)/python manifests/install.py $(HELM) > manifests/install.yaml.new
	mv manifests/install.yaml.new manifests/install.yaml

# With docker where its daemon answers, else with the lab, which puts them into the nodes of its running labs too.
# LABNAME=NAME: with the lab, into the nodes of that one alone.
images:
	@if [ -z "$(LABNAME)" ] && docker info >/dev/null 2>&1; then build="docker build -t"; \
	elif [ -n "$(LAB)" ]; then build="$(LAB) build $(if $(LABNAME),--name $(LABNAME))"; \
	else echo "make images needs docker with its daemon, or kubelab on PATH or in ../shared/kubelab" >&2; exit 1; fi; \
	set -ex; $$build outlast-operator:dev -f Dockerfile.operator .; $$build outlast-training:dev -f Dockerfile.training .

golden: $(READY)
	PYTHONPATH=tests $(BIN)/python -m support.charts

# TIMINGS=benchmarks/kubernetes.json writes what was measured there, for benchmarks/cluster_faults.py.
e2e: $(READY)
	$(BIN)/python -m pytest tests/e2e --durations=12 $(if $(TIMINGS),--timings=$(TIMINGS))

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
