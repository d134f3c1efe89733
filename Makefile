# `make` says what there is. Every target sets up .venv first, where it is not up to date.

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup reproduce compare fetch rehearse test bench lab readme drift lint clean

MODEL ?= bookworm
export MODEL  # reaches Python as it was typed, spaces included: no shell splits it
PYTHON ?=
PIP_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
FITS := import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  GRID=      full (default; rehearse: reduced), or reduced: fewer prompts, strengths and draws, and it says so"
	@echo "  MODEL=     bookworm (default), gpt2-small, organisation/model of the hub, or a local folder"
	@echo "  MODELS=    compared in notebook 07, separated by spaces, in place of the siblings"
	@echo "  WORKERS=   for notebook 07: a number of processes (default: one per core), or tcp://... of a Dask scheduler"
	@echo "  DEVICE=    cuda (default where there is one), cpu, or auto: one model over several GPUs"
	@echo "  PIP_ARGS=  passed to pip install, e.g. an index that has torch for CPUs only"
	@echo "  PYTHON=    the Python 3.11 that makes .venv, where it is not on the path"

setup: $(READY)  ## .venv with every package of requirements.lock (1-3 minutes, once)

reproduce: $(READY)  ## run every notebook on MODEL; bookworm's replace the committed ones
	@[ "$$MODEL$$MODELS" = bookworm ] || $(PY) -m helpers.fetch
	@$(PY) notebooks/run.py && GRID= $(PY) -m helpers.claims

compare: $(READY)  ## put the report cards of all models in figures/ side by side
	@$(PY) -m helpers.compare

fetch: $(READY)  ## download what MODEL needs, for a machine without a network
	@$(PY) -m helpers.fetch

rehearse: $(READY)  ## run every notebook offline on random weights of GPT-2 small's size: time, memory, no results
	@PYTHONPATH=notebooks $(PY) tests/rehearse.py

test: $(READY)  ## run the tests
	@$(PY) -m pytest

bench: $(READY)  ## measure speed and memory, as ratios, on random weights of GPT-2 small's size
	@$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --quiet --no-deps steering-vectors==0.12.2
	@$(PY) -m pytest tests/benchmarks --jaxtyping-packages= -s

lab: $(READY)  ## open JupyterLab
	@$(PY) -m jupyterlab

readme: $(READY)  ## write the README's table of claims anew
	@$(PY) -m helpers.claims

drift: $(READY)  ## compare figures/bookworm/*.csv with the committed ones, within a tolerance
	@$(PY) tests/drift.py

lint: $(READY)  ## check style and likely errors
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

clean:  ## remove .venv and caches; figures stay
	rm -rf $(VENV) .rehearsal *.egg-info build dist .pytest_cache .ruff_cache .hypothesis .benchmarks .ci/*.log
	find . -name __pycache__ -prune -exec rm -rf {} +

# Made anew when the lock or the direct dependencies change. The lock is installed first and alone decides every version.
$(READY): requirements.lock pyproject.toml
	@if [ -d $(VENV) ]; then \
	    $(PY) -c '$(FITS)' 2>/dev/null || { echo "$(VENV) is not a Python 3.11: make clean, then try again." >&2; exit 1; }; \
	else \
	    for python in "$(PYTHON)" python3.11 python3 python; do \
	        "$$python" -c '$(FITS)' 2>/dev/null && break; \
	        python=; \
	    done; \
	    [ -n "$$python" ] || { \
	        echo "No Python 3.11 (with venv and pip) was found. Install it, or say where it is:" >&2; \
	        echo "  make PYTHON=/path/to/python3.11 ...      or with conda: conda env create -f environment.yml" >&2; \
	        exit 1; \
	    }; \
	    echo "Making $(VENV) with $$("$$python" -c 'import sys; print(sys.executable)')"; \
	    "$$python" -m venv $(VENV); \
	fi
	@echo "Installing requirements.lock into $(VENV): 1-3 minutes"
	@$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -r requirements.lock
	@$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --quiet --no-deps -e .
	@touch $@
