# Everything from a fresh clone: needs Python >= 3.11 and make, nothing else. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ENGINE ?= docker
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check --quiet install
COMPILE = $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --upgrade --generate-hashes \
          --no-emit-index-url --no-header --quiet

.PHONY: help demo test lint cluster slow image audit requirements clean

help:            ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

demo: $(VENV)/.runtime    ## train BN-Inception on two processes with synchronized statistics, on digits (about 4 minutes)
	$(BIN)/pipeline train recipe=bn_x5 data=digits cluster.devices=2 run.id=demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.dev lint    ## lint, types and all quick tests, JOBS of them at a time
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: $(VENV)/.dev         ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cluster: $(VENV)/.dev      ## jobs on a Slurm cluster that is raised for them (Debian and root; about 4 minutes)
	$(BIN)/python -m pytest -rs -m "cluster and not slow" tests/slurm

slow: $(VENV)/.dev         ## the tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not gpu and not cluster and not container"

image:           ## build the image `pipeline` (ENGINE=podman without docker; see docker/README.md)
	BUILDAH_FORMAT=docker $(ENGINE) build -f docker/Dockerfile --build-arg REVISION=$$(git rev-parse HEAD) -t pipeline .

audit: $(VENV)/.audit      ## pins, hashes, licences and known vulnerabilities of all that is required
	$(BIN)/python requirements/audit.py

requirements: $(VENV)/.dev    ## compile the pinned, hash-checked requirement files anew from pyproject.toml
	$(COMPILE) -o requirements/runtime.txt
	$(COMPILE) --extra dev -o requirements/dev.txt
	$(COMPILE) --extra peers -o requirements/peers.txt
	$(COMPILE) --extra onnx -o requirements/onnx.txt
	$(COMPILE:pyproject.toml=) --group audit -o requirements/audit.txt

clean:           ## remove the environment and caches; runs/ and shards/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: Python >= 3.11 is needed, found " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements/runtime.txt pyproject.toml pipeline/data/jpeg_region.c | $(VENV)/bin/python
	@echo "installing into $(VENV) (5.5 GB, about two minutes, once)"
	$(PIP) --require-hashes -r requirements/runtime.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	$(PIP) --require-hashes -r requirements/dev.txt
	@touch $@

$(VENV)/.audit: requirements/audit.txt | $(VENV)/.runtime
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r requirements/audit.txt
	@touch $@
