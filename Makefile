# Everything that a developer runs. `make` alone explains.
SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
LAB_DIR ?= /var/tmp/isthmus-lab
# Images for the lab: where Slurm's unprivileged jobs can read them.
IMAGES_DIR ?= /var/tmp/isthmus-images
FUZZ_SECONDS ?= 600
PACKAGES := contracts runtime bridge operator examples
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
# What a target needs in .venv: the packages (product), or a group of pyproject.toml too. A stamp stands for each.
with = $(addprefix .venv/.with-,$(1))
writable = [ -w . ] && { [ ! -e .venv ] || [ -w .venv ]; } || { \
  echo "isthmus: .venv is not this user's to write; remove it as its owner, or use a checkout of your own"; exit 1; }

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup install demo test test-fast fuzz lint generate docs images dist e2e bench bench-all bench-peers lab-up lab-down clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(call with,dev) ## the virtual environment .venv, with all packages and tools in it

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "isthmus: needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing Debian's package python3-venv"; export DEBIAN_FRONTEND=noninteractive; \
	    apt-get -q update && apt-get -qy install --no-install-recommends python3-venv; \
	  else echo "isthmus: $(PYTHON) cannot make virtual environments; as root: apt-get install python3-venv"; exit 1; fi; \
	  } >&2
	@$(writable)
	@$(PYTHON) -m venv .venv

.venv/.with-product: constraints.txt $(PACKAGES:=/pyproject.toml) | .venv/bin/pip
	@$(writable)
	@echo "installing Isthmus into .venv (torch makes it several minutes the first time)"
	@$(PIP) -U pip
	@$(PIP) $(PACKAGES:%=-e %)
	@touch $@

.venv/.with-%: pyproject.toml constraints.txt .venv/.with-product
	@$(writable)
	@echo "installing the tools of '$*' (pyproject.toml) into .venv"
	@$(PIP) --group $*
	@touch $@

install: $(call with,product) ## the virtual environment with Isthmus itself, as data scientists need it

demo: $(call with,product) ## train digits over four clients on this machine, as a cluster would
	.venv/bin/isthmus run examples/digits.yaml --dir runs/demo --overwrite

test: $(call with,test) ## all tests: unit, integration, chart, Slurm, Kubernetes, end to end; LAYERS="unit chart" runs those
	@IMAGES_DIR=$(IMAGES_DIR) tests/run.sh $(LAYERS)

test-fast: $(call with,test) ## the tests that need neither Kubernetes nor Slurm
	@tests/run.sh unit integration chart

fuzz: $(call with,test) ## ten minutes of arbitrary and damaged messages to an aggregator
	ISTHMUS_FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -n0 -s tests/integration/federation/test_protocol_fuzz.py

lint: $(call with,lint) ## ruff, mypy, the layers of imports, folders and prose
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo --cache-dir .mypy_cache/imports
	$(PY) -m tools.checks

generate: $(call with,generate) ## protobuf stubs, CRDs, the policy's schema, dashboards, the documentation's reference
	cd contracts && PATH=$(CURDIR)/.venv/bin:$$PATH python -m grpc_tools.protoc -I . \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. isthmus_contracts/pb/*.proto
	$(PY) -m isthmus_contracts.manifests.crd crds
	$(PY) -m isthmus_bridge.cli schema > bridge/examples/policy.schema.json
	cp crds/*.yaml charts/isthmus/files/crds/
	cp charts/isthmus/values.yaml charts/isthmus/files/
	$(PY) -m charts.dashboards charts/isthmus/files/dashboards
	$(PY) -m tools.reference docs/reference

docs: $(call with,docs) ## the documentation's site, in build/site; a dead link fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

images: $(call with,product) ## container images of the operator, the bridge and the runtime
	$(PY) images/build

dist: $(call with,release) ## a release, in dist/: wheels, chart, images, SBOMs, air-gapped bundle; DIST="wheels chart" makes those
	$(PY) -m tools.release dist $(DIST)

e2e: $(call with,test) ## the end-to-end tests, telling what they see; KUBECONFIG=… runs the cluster tests on your cluster
	@IMAGES_DIR=$(IMAGES_DIR) tests/run.sh --verbose $(if $(KUBECONFIG),--kubeconfig $(KUBECONFIG)) e2e

bench: $(call with,bench) ## the quick benchmarks (minutes): JSON lines and tables
	$(PY) -m bench

bench-all: $(call with,bench) ## all of them at full size (hours; 8 GB of memory)
	$(PY) -m bench --all

bench-peers: $(call with,bench) ## no-op rounds of Flower and NVFlare (each in an environment of its own) beside ours
	$(PY) -m bench.peers

lab-up: $(call with,lab) ## a real Kubernetes and a real Slurm on this (Debian) machine; needs root
	$(PY) -m lab up --dir $(LAB_DIR)

lab-down: $(call with,lab) ## the lab, away without a trace
	$(PY) -m lab down --dir $(LAB_DIR)

clean: ## what builds and tests left in the tree
	rm -rf build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis $(PACKAGES:=/build) $(PACKAGES:=/*.egg-info)
