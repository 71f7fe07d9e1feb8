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
REQUESTS ?= 10000
PREFIX ?= /usr/local
DESTDIR ?=
SYSCONFDIR ?= /etc
LIBDIR := $(PREFIX)/lib/billingd
UNITDIR ?= $(PREFIX)/lib/systemd/system
MANDIR ?= $(PREFIX)/share/man

.PHONY: help demo browser test chaos fuzz audit lint format bench wheel install installed uninstall clean

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

fuzz: $(READY) ## every parser, then broken requests (REQUESTS=) and slow connections against the real listener
	BILLINGD_FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest tests/adapters/test_fuzz_parsers.py
	$(BIN)/python tests/fuzz.py --requests $(REQUESTS)

audit: ## known vulnerabilities of all that requirements.lock pins; fails where the registry tells of none
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9'
	build/audit/bin/pip-audit --strict --progress-spinner off --disable-pip --require-hashes -r requirements.lock

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m hatchling build -t wheel

# The new program is made beside the old one and then takes its place, so that a daemon that runs keeps its files
# as long as can be. Secrets and a configuration that is there already are left alone.
install: ## as a service: program, units, manual page, example configuration (PREFIX=/usr/local, DESTDIR=)
	umask 022 && $(MAKE) --no-print-directory installed  # root's may be 077, and the service's user is another

installed:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "billingd needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	rm -rf build/install "$(DESTDIR)$(LIBDIR).new" && mkdir -p build/install
	.ci/locked > build/install/running.lock && .ci/locked hatchling > build/install/building.lock
	$(PYTHON) -m venv build/install/tools
	build/install/tools/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r build/install/building.lock
	build/install/tools/bin/python -m hatchling build -t wheel -d build/install/wheel
	install -d -m 0755 "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/lib" "$(DESTDIR)$(UNITDIR)"
	$(PYTHON) -m venv "$(DESTDIR)$(LIBDIR).new"
	"$(DESTDIR)$(LIBDIR).new/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r build/install/running.lock
	"$(DESTDIR)$(LIBDIR).new/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index build/install/wheel/*.whl
	grep -rlI "$(DESTDIR)$(LIBDIR).new" "$(DESTDIR)$(LIBDIR).new/bin" "$(DESTDIR)$(LIBDIR).new/pyvenv.cfg" | xargs sed -i 's|$(DESTDIR)$(LIBDIR).new|$(LIBDIR)|g'
	rm -rf "$(DESTDIR)$(LIBDIR).old"
	if test -d "$(DESTDIR)$(LIBDIR)"; then mv "$(DESTDIR)$(LIBDIR)" "$(DESTDIR)$(LIBDIR).old"; fi
	mv "$(DESTDIR)$(LIBDIR).new" "$(DESTDIR)$(LIBDIR)" && rm -rf "$(DESTDIR)$(LIBDIR).old"
	ln -sfn "$(LIBDIR)/bin/billingd" "$(DESTDIR)$(PREFIX)/bin/billingd"
	for unit in billingd.service billingd.socket billingd-backup.service billingd-backup.timer; do \
	  sed 's|/usr/bin/env billingd|$(PREFIX)/bin/billingd|; s|/etc/billingd|$(SYSCONFDIR)/billingd|g' systemd/$$unit \
	    > build/install/$$unit && install -m 0644 build/install/$$unit "$(DESTDIR)$(UNITDIR)/$$unit" || exit 1; done
	install -d -m 0755 "$(DESTDIR)$(SYSCONFDIR)/billingd"
	install -d -m 0700 "$(DESTDIR)$(SYSCONFDIR)/billingd/secrets"
	test -e "$(DESTDIR)$(SYSCONFDIR)/billingd/billingd.toml" || \
	  install -m 0644 systemd/billingd.toml "$(DESTDIR)$(SYSCONFDIR)/billingd/billingd.toml"
	case "$$(readlink -f "$(DESTDIR)$(LIBDIR)/bin/python")" in /root/*|/home/*) \
	  echo "warning: the service may not see $$(readlink -f "$(DESTDIR)$(LIBDIR)/bin/python") (ProtectHome=): install with PYTHON=/usr/bin/python3" >&2;; esac
	"$(DESTDIR)$(LIBDIR)/bin/python" -m billingd man > build/install/billingd.1
	install -D -m 0644 build/install/billingd.1 "$(DESTDIR)$(MANDIR)/man1/billingd.1"

uninstall: ## remove what install made, but configuration, secrets and the store
	for unit in billingd.service billingd.socket billingd-backup.service billingd-backup.timer; do \
	  rm -f "$(DESTDIR)$(UNITDIR)/$$unit"; done
	rm -rf "$(DESTDIR)$(LIBDIR)" "$(DESTDIR)$(PREFIX)/bin/billingd" "$(DESTDIR)$(MANDIR)/man1/billingd.1"

clean: ## remove what the other targets made
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
