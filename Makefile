# Every target sets itself up: it makes .venv with the pinned dependencies first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

# Compiled Python files make every command start twice as fast; an empty value means: write them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint install clean help

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## train, merge, evaluate and audit the demo study; ends in results/demo/report.html
	@$(BIN)/snakemake --config study=demo
	@echo "The report: results/demo/report.html"

test: $(READY)  ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(READY)  ## ruff, mypy, snakefmt and snakemake --lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

install: $(READY)  ## make .venv with the pinned dependencies

clean:  ## delete .venv and the demo's results
	rm -rf .venv .snakemake results/demo

# torch comes through pip, so that your pip configuration decides which build; uv does the rest.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mergelab needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	@echo "Installing the pinned dependencies into .venv (one to two minutes, once) ..."
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check \
	  -c constraints.txt uv torch
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $(READY)
