# Everything that a developer runs. `make` alone explains.
SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
LAB_DIR ?= /var/tmp/isthmus-lab
# Images for the lab: where Slurm's unprivileged jobs can read them.
IMAGES_DIR ?= /var/tmp/isthmus-images
FUZZ_SECONDS ?= 600
ENVIRONMENT := .venv/.complete
PACKAGES := contracts runtime bridge operator examples

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast fuzz lint generate docs images dist e2e bench bench-all bench-peers lab-up lab-down clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(ENVIRONMENT) ## the virtual environment .venv, with all packages in it

$(ENVIRONMENT): constraints.txt pyproject.toml $(PACKAGES:=/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "isthmus: needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@echo "setting up .venv (once; torch makes it several minutes)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv .venv; \
	  else echo "isthmus: this Python cannot make virtual environments; install python3-venv"; exit 1; fi; }
	@$(PY) -m pip install -q --disable-pip-version-check -U 'pip>=25.1'
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --group dev $(PACKAGES:%=-e %)
	@touch $@

demo: $(ENVIRONMENT) ## train digits over four clients on this machine, as a cluster would
	.venv/bin/isthmus run examples/digits.yaml --dir runs/demo --overwrite

test: $(ENVIRONMENT) ## all tests: unit, integration, chart, Slurm, Kubernetes, end to end
	@IMAGES_DIR=$(IMAGES_DIR) tests/run.sh

test-fast: $(ENVIRONMENT) ## the tests that need neither Kubernetes nor Slurm
	$(PY) -m pytest tests/unit tests/integration tests/chart

fuzz: $(ENVIRONMENT) ## ten minutes of arbitrary and damaged messages to an aggregator
	ISTHMUS_FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -n0 -s tests/integration/federation/test_protocol_fuzz.py

lint: $(ENVIRONMENT) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

generate: $(ENVIRONMENT) ## protobuf stubs, CRDs, the policy's schema, dashboards, the documentation's reference
	cd contracts && PATH=$(CURDIR)/.venv/bin:$$PATH python -m grpc_tools.protoc -I . \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. isthmus_contracts/pb/*.proto
	$(PY) -m isthmus_contracts.crd crds
	$(PY) -m isthmus_bridge.cli schema > bridge/examples/policy.schema.json
	cp crds/*.yaml charts/isthmus/files/crds/
	$(PY) -m charts.dashboards charts/isthmus/files/dashboards
	$(PY) -m reference docs/reference

docs: $(ENVIRONMENT) ## the documentation's site, in build/site; a dead link fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

images: $(ENVIRONMENT) ## container images of the operator, the bridge and the runtime
	$(PY) images/build

dist: $(ENVIRONMENT) ## a release, in dist/: wheels, chart, images, SBOMs, air-gapped bundle; DIST="wheels chart" makes those
	$(PY) -m release dist $(DIST)

e2e: $(ENVIRONMENT) ## the end-to-end tests, telling what they see; KUBECONFIG=… runs the cluster tests on your cluster
	@IMAGES_DIR=$(IMAGES_DIR) tests/run.sh --verbose $(if $(KUBECONFIG),--kubeconfig $(KUBECONFIG)) e2e

bench: $(ENVIRONMENT) ## the quick benchmarks (minutes): JSON lines and tables
	$(PY) -m bench

bench-all: $(ENVIRONMENT) ## all of them at full size (hours; 8 GB of memory)
	$(PY) -m bench --all

bench-peers: $(ENVIRONMENT) ## no-op rounds of Flower and NVFlare (each in an environment of its own) beside ours
	$(PY) -m bench.peers

lab-up: $(ENVIRONMENT) ## a real Kubernetes and a real Slurm on this (Debian) machine; needs root
	$(PY) -m lab up --dir $(LAB_DIR)

lab-down: $(ENVIRONMENT) ## the lab, away without a trace
	$(PY) -m lab down --dir $(LAB_DIR)

clean: ## what builds and tests left in the tree
	rm -rf build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis $(PACKAGES:=/build) $(PACKAGES:=/*.egg-info)
