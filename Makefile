# Both commands of the README work from a bare clone with Python ≥ 3.11, pip and make:
#   make sweep    set up, run the quickstart sweep on this machine, print its table
#   make test     set up, run every test that this machine can run, and say what was skipped and why
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup sweep test test-slurm check clean

help:
	@sed -n 's/^#   //p' Makefile; echo "make check     ruff and mypy"; echo "make test-slurm  the long suite on a real Slurm cluster on this machine"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantsweep needs Python 3.11 or newer, this is %s. Try: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, transformers, lm-eval …: some minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

sweep: $(READY)
	$(BIN)/python launch.py -m +sweeps=quickstart
	$(BIN)/python -m analysis results/quickstart

test: $(READY)
	$(BIN)/python -m pytest -m "not long" --numprocesses auto --maxprocesses 4 --dist loadgroup

test-slurm: $(READY)
	QUANTSWEEP_REQUIRE_SLURM=1 $(BIN)/python -m pytest -m slurm --durations=15 tests/slurm

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
