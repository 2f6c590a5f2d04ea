# Daily gestures. `make papers/<slug>` reproduces a paper, `make test` checks the whole house.
PYTHON ?= python3
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := true

.DEFAULT_GOAL := help
.PHONY: help setup test ui board clean constraints FORCE

help:
	@echo "make papers/<slug>   reproduce a paper: data, training, figures, verdict (for example: make papers/cape)"
	@echo "make test            lint and run every test"
	@echo "make ui              browse the tracked runs on 127.0.0.1"
	@echo "make board           scoreboard over all papers: README table and board/index.html"
	@echo "make clean           remove caches and git-ignored outputs, keep .venv and results/"

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@test -x .venv/bin/python || { echo "creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "installing the pinned dependencies (some minutes the first time)"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

papers/%: .venv/.installed FORCE
	@test -f $@/paper.yaml || { echo "error: there is no paper '$*'; there are: $$(cd papers && ls -d */ | tr -d / | grep -v __ | tr '\n' ' ')" >&2; exit 1; }
	@REPRISE_VERDICT=quiet dvc repro $@
	@reprise verdict $@ --show
	@echo "Look at the runs: make ui"

test: .venv/.installed
	ruff check .
	ruff format --check .
	pytest -n auto --dist loadfile

ui: .venv/.installed
	@reprise ui

board: .venv/.installed
	@reprise board

clean:
	rm -rf papers/*/data papers/*/runs board .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Resolve all dependencies anew and pin what was found; commit the result together with results that still reproduce.
constraints:
	rm -rf .venv && $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -e '.[dev,bench,unipredict]'
	( echo "# Every direct and transitive dependency, at the versions that the committed results were made with ('make constraints')."; \
	  .venv/bin/python -m pip list --format=freeze --exclude-editable | grep -v '^pip=' | sed 's/+cpu$$//' ) > constraints.txt

FORCE:
