# Every target works in a fresh checkout: Python >= 3.11, make and the package registries are all it needs.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
STORE ?=
PART ?=
SEED ?=
SEEDS ?=
DAYS ?=
KILLS ?=
PAIRS ?=

.PHONY: help demo browser test chaos lint format bench wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "billingd needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(READY) ## the whole job against a local sandbox, with outages and kills (STORE=URL for PostgreSQL)
	$(BIN)/billingd demo $(if $(STORE),--store $(STORE))

browser: ## install Chromium for the tests of the page, where that is allowed; else say how
	@command -v chromium >/dev/null 2>&1 || test -x "$$BILLINGD_CHROMIUM" || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null 2>&1 && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	  echo "no Chromium: the tests of the page in a browser are skipped; get it with: apt-get install chromium fonts-dejavu-core" >&2

test: $(READY) browser ## every test, on SQLite and on a real PostgreSQL
	$(BIN)/python -m pytest

CHAOS_TESTS := $(if $(PART),$(sort $(wildcard tests/chaos/test_$(PART).py tests/chaos/test_$(PART)_*.py)),tests/chaos)

chaos: $(READY) ## the whole proof, for hours: PART=simulation|points|network|time|disk|kills|planted, SEED= for one
	@test -n "$(CHAOS_TESTS)" || { echo "no such part: tests/chaos/test_$(PART).py" >&2; exit 2; }
	BILLINGD_CHAOS=full BILLINGD_CHAOS_SEED=$(SEED) BILLINGD_CHAOS_SEEDS=$(SEEDS) BILLINGD_CHAOS_DAYS=$(DAYS) \
	  BILLINGD_CHAOS_KILLS=$(KILLS) BILLINGD_CHAOS_PAIRS=$(PAIRS) \
	  $(BIN)/python -m pytest --verbose --numprocesses=2 $(CHAOS_TESTS)

lint: $(READY) ## ruff, mypy strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## put every file into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## the whole chain at size: time, calls, memory
	$(BIN)/python tests/bench.py

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m hatchling build -t wheel

clean: ## remove what the other targets made
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
