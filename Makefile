# `make run` is all a first visit needs. Everything is installed into .venv, once, and again only when the pins change.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install run test test-all lint repro publish doctor claims freeze

PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP := .venv/installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-12)
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(STAMP) ## install the pinned set into .venv

$(STAMP):
	@echo "Installing the $$(grep -c '^[^#].*==' constraints.txt) packages of constraints.txt into .venv: 2.5 GB, about 3 minutes."
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v[:2] == (3, 11) else f"Python 3.11 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=...")'
	@$(PYTHON) -m venv .venv
	@PYTHONUNBUFFERED=1 .venv/bin/pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' 2> >(grep -v ^WARNING >&2) | \
		awk '/^(Collecting|Requirement already)/ { if (++n % 40 == 0) print "  " n " packages found" } \
		     /^Installing collected/ { print "  unpacking (the longest part)" } { fflush() }'
	@rm -f .venv/installed-* && touch $@
	@echo "Installed."

run: $(STAMP) ## bring every stage up to date and show the verdict; SCALE=quick|full sets `scale` in params.yaml, RETIME=1 times anew
	@$(IN_VENV) python -m flows.compress $(if $(SCALE),--scale $(SCALE)) $(if $(RETIME),--retime)

repro: $(STAMP) ## the same work without Prefect: dvc repro
	@$(IN_VENV) python -m tasks.core.preflight
	@$(IN_VENV) dvc repro

test: $(STAMP) ## the fast tests
	@$(IN_VENV) pytest -q -n auto --maxprocesses 8 --dist loadfile

test-all: $(STAMP) ## every test that this machine can run
	@$(IN_VENV) pytest -q -m "slow or not slow"

lint: $(STAMP) ## ruff
	@$(IN_VENV) ruff check .

doctor: ## what is wrong with this machine or this installation, in plain lines
	@if [ -x .venv/bin/python ]; then $(IN_VENV) python -m flows.doctor; else echo "not installed: run make install"; exit 1; fi

publish: $(STAMP) ## what the last run measured into reports/quick or reports/full and the README's tables, to be committed
	@$(IN_VENV) python -m tasks.report.publish

claims: $(STAMP) ## every claim of the README, computed from committed files
	@$(IN_VENV) python -m benchmarks.claims

freeze: $(STAMP) ## write the installed set into constraints.txt, once the tests pass with it
	@{ sed '/^#/!d' constraints.txt; .venv/bin/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt
