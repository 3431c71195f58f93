# Commands of development. `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
LAB_DIR ?= /var/tmp/isthmus-lab
# Images for the lab, in a place that Slurm's unprivileged jobs can read.
IMAGES_DIR ?= /var/tmp/isthmus-images
FUZZ_SECONDS ?= 600
PACKAGES := contracts runtime bridge operator examples
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
# Contents of .venv that a target needs: the packages (product), or also a group of pyproject.toml. Each has a stamp.
with = $(addprefix .venv/.with-,$(1))
writable = [ -w . ] && { [ ! -e .venv ] || [ -w .venv ]; } || { \
  echo "isthmus: .venv is not writable for this user; remove it as its owner, or use your own checkout"; exit 1; }

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup install demo test test-fast check fuzz lint generate docs images dist e2e bench bench-all bench-peers lab-up lab-down clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(call with,dev) ## create .venv with all packages and tools

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "isthmus: needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing Debian's package python3-venv"; export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -q update && apt-get -qy install --no-install-recommends python3-venv; \
	  else echo "isthmus: $(PYTHON) cannot create virtual environments; as root: apt-get install python3-venv"; exit 1; fi; \
	  } >&2
	@$(writable)
	@$(PYTHON) -m venv .venv

.venv/.with-product: constraints.txt $(PACKAGES:=/pyproject.toml) | .venv/bin/pip
	@$(writable)
	@echo "installing Isthmus into .venv (the first time takes several minutes, because of torch)"
	@$(PIP) -U pip
	@$(PIP) $(PACKAGES:%=-e %)
	@touch $@

.venv/.with-%: pyproject.toml constraints.txt .venv/.with-product
	@$(writable)
	@echo "installing the tools of '$*' (pyproject.toml) into .venv"
	@$(PIP) --group $*
	@touch $@

install: $(call with,product) ## create .venv with the packages only, as data scientists need them

demo: $(call with,product) ## train digits with four clients on this machine, as in a cluster
	.venv/bin/isthmus run examples/digits.yaml --dir runs/demo --overwrite

test: $(call with,test) ## run all tests: unit, integration, chart, Slurm, Kubernetes, end to end; LAYERS="unit chart" runs some
	@IMAGES_DIR=$(IMAGES_DIR) tests/run.sh $(LAYERS)

test-fast: $(call with,test) ## run the tests that need neither Kubernetes nor Slurm
	@tests/run.sh unit integration chart

fuzz: $(call with,test) ## send arbitrary and damaged messages to an aggregator for ten minutes
	ISTHMUS_FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -n0 -s tests/integration/federation/test_protocol_fuzz.py

check: $(call with,lint test) ## lint and unit-test the files changed since BASE (main), in under a minute
	@$(PY) -m tools.check_changed $(BASE)

lint: $(call with,lint) ## run ruff, mypy, and the checks of imports, folders and prose
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo --cache-dir .mypy_cache/imports
	$(PY) -m tools.checks

generate: $(call with,generate) ## generate protobuf stubs, CRDs, the policy's schema, dashboards, reference pages
	cd contracts && PATH=$(CURDIR)/.venv/bin:$$PATH python -m grpc_tools.protoc -I . \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. isthmus_contracts/pb/*.proto
	$(PY) -m isthmus_contracts.manifests.crd crds
	$(PY) -m isthmus_bridge.cli schema > bridge/examples/policy.schema.json
	cp crds/*.yaml charts/isthmus/files/crds/
	cp charts/isthmus/values.yaml charts/isthmus/files/
	$(PY) -m charts.dashboards charts/isthmus/files/dashboards
	$(PY) -m tools.reference docs/reference

docs: $(call with,docs) ## build the documentation's site in build/site; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

images: $(call with,product) ## build the container images of operator, bridge and runtime
	$(PY) images/build

dist: $(call with,release) ## build a release in dist/: wheels, chart, images, SBOMs, air-gapped bundle; DIST="wheels chart" builds some
	$(PY) -m tools.release dist $(DIST)

e2e: $(call with,test) ## run the end-to-end tests with their output; KUBECONFIG=… uses your cluster
	@IMAGES_DIR=$(IMAGES_DIR) tests/run.sh --verbose $(if $(KUBECONFIG),--kubeconfig $(KUBECONFIG)) e2e

bench: $(call with,bench) ## run the quick benchmarks (minutes); print JSON lines and tables
	$(PY) -m bench

bench-all: $(call with,bench) ## run all benchmarks at full size (hours; 8 GB of memory)
	$(PY) -m bench --all

bench-peers: $(call with,bench) ## run no-op rounds of Flower and NVFlare (each in its own environment) and of Isthmus
	$(PY) -m bench.peers

lab-up: $(call with,lab) ## start a real Kubernetes and a real Slurm on this (Debian) machine; needs root
	$(PY) -m lab up --dir $(LAB_DIR)

lab-down: $(call with,lab) ## stop the lab and remove its files
	$(PY) -m lab down --dir $(LAB_DIR)

clean: ## remove the files of builds and tests
	rm -rf build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis $(PACKAGES:=/build) $(PACKAGES:=/*.egg-info)
