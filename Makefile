# The verbs of this project, for people and for CI; `make` lists them. Needs nothing but Python and a package index.

HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
PYTHON ?= python3

VENV := .venv
PY := $(VENV)/bin/python
# Stamps, touched only after all of an installation has succeeded.
RUN_TOOLS := $(VENV)/installed
DEV_TOOLS := $(VENV)/installed-dev

HAS_PYTHON := -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))'
HAS_PIP := -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))'
# A terminal gets pip's progress bars (torch is large), a log only its errors.
PIP_INSTALL = if [ -t 1 ]; then quiet=; else quiet=-qq; fi; $(PY) -m pip install $$quiet --no-input --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve setup dev extras test check bench clean

help:  ## list these verbs
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r verb what; do \
		printf '  make %-8s %s\n' "$$verb" "$$what"; done

serve: $(RUN_TOOLS)  ## start the server (HOST=127.0.0.1 PORT=8000 ARGS='more flags'; ARGS=--help lists them)
	@exec $(PY) superserve.py --host $(HOST) --port $(PORT) $(ARGS)

setup: $(RUN_TOOLS)  ## make the environment in .venv, without starting anything (PYTHON=python3)
	@echo "ready: $(VENV)"

dev: $(DEV_TOOLS)  ## make the environment with the tools for training, testing and plotting
	@echo "ready: $(VENV)"

extras: $(DEV_TOOLS)  ## install what some tests are skipped without: Chromium, perf_analyzer (on Debian, as root)
	@apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium libb64-0d >/dev/null
	@$(PY) scripts/fetch_perf_analyzer.py

test: $(DEV_TOOLS)  ## run the tests (ARGS='-m "not slow"' leaves out the slow ones)
	@$(PY) -m pytest $(ARGS)

check: $(DEV_TOOLS)  ## lint, check types and sizes
	@$(PY) -m ruff check
	@$(PY) -m mypy
	@$(PY) scripts/check_sizes.py

bench: $(DEV_TOOLS)  ## measure the server on this machine
	@$(PY) scripts/bench_serving.py $(ARGS)

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_TOOLS): requirements.txt
	@$(PY) $(HAS_PIP) 2>/dev/null || $(PYTHON) $(HAS_PYTHON) 2>/dev/null || { \
		echo "SuperServe needs Python 3.11 or newer with venv, but $(PYTHON) is: $$($(PYTHON) --version 2>/dev/null || echo missing)." \
			"Name another with PYTHON=/path/to/python3.12 (on Debian, install python3-venv too)." >&2; exit 1; }
	@$(PY) $(HAS_PIP) 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing requirements.txt into $(VENV) (once; torch is large)"
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(DEV_TOOLS): requirements-dev.txt $(RUN_TOOLS)
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(PIP_INSTALL) -r requirements.txt -r requirements-dev.txt
	@touch $@
