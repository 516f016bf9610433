# Verbs only. Each sets up what it needs: a .venv of its own with the pinned dependencies of constraints.txt.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup quickstart test test-unit test-others check bench report clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt plots/offline.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Plumbline needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --editable '.[dev]'
	python -m plots.offline .dvc/tmp/plots.html
	@touch $@

setup: $(READY)  ## make .venv with the pinned dependencies, and the offline plots page

quickstart: $(READY)  ## run the default study and print its comparison table (about 5 minutes on 2 CPU cores)
	dvc exp run

test: $(READY)  ## run all tests (under 10 minutes on 2 cores)
	ruff check .
	@$(MAKE) --no-print-directory -j2 test-unit test-others

# Two halves that take about as long, side by side; each is always the same tests in the same order.
test-unit: $(READY)
	python -m pytest tests/unit

test-others: $(READY)
	python -m pytest --ignore=tests/unit

check: $(READY)  ## style, import rules and the fast tests
	ruff check .
	python -m pytest -m 'not slow'

bench: $(READY)  ## measure the engine beside its peers (NANOGPT=PATH of a checkout, SIZE=cpu or gpu)
	python -m benchmarks.speed --size $(or $(SIZE),cpu) $(if $(NANOGPT),--nanogpt $(NANOGPT))

report: $(READY)  ## make the tables and reports of the current study again from its rows
	dvc repro --force --single-item summarize

clean:  ## remove the environment and caches; keeps results, reports and records
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
