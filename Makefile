# `make` lists the commands. Everything is installed into .venv; nothing else on the machine changes.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := deploy/constraints.txt
NATIVE := $(wildcard stream/*/*.pyx stream/*/*.pxd) deploy/build_native.py
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS)

.PHONY: help demo up down test chaos bench check train clean
.DELETE_ON_ERROR:

# A missing compiled module makes both stamps stale. `foreach` leaves a space for each source, so strip them.
NOT_COMPILED := $(strip $(foreach source,$(wildcard stream/*/*.pyx),\
	$(if $(wildcard $(source:.pyx=.*.so)),,$(source))))
ifneq ($(NOT_COMPILED),)
.PHONY: .venv/base .venv/test
endif

help:
	@echo 'make demo    Score simulated shoppers: prints alerts and writes a report.'
	@echo 'make up      Start Kafka, Triton, a worker and simulated shoppers here.'
	@echo 'make down    Stop everything that make up started.'
	@echo 'make test    Run all tests. Installs PyTorch for the training tests.'
	@echo 'make chaos   Kill workers and a broker during a million events, twice, and'
	@echo '             audit the output. SEED=n repeats a run.'
	@echo 'make bench   Measure the published figures. ONLY=names selects some of them;'
	@echo '             PEERS=DIR adds the peer systems whose harness is in DIR.'
	@echo 'make check   Lint, check the types, and check which package imports which.'
	@echo 'make train   Train the shipped model again and export it to triton_models/.'
	@echo 'make clean   Delete .venv, build/ and demo/.'

demo: .venv/base
	@$(BIN)/stream demo

up: .venv/base
	@$(BIN)/python -m deploy.local.stack up

# Stopping installs nothing, unless something runs and .venv is gone.
down: $(if $(wildcard .venv/base),,$(if $(wildcard build/local),.venv/base))
	@if [ -e .venv/base ]; then $(BIN)/python -m deploy.local.stack down; else echo 'Nothing is up.'; fi

# Two processes, each with a Kafka and a Triton of its own. A file stays in one of them, so its fixtures are made once.
# If one crashes, the run fails and names the test. A replacement may wait for ever: pytest-xdist deals out files that
# are done already (github.com/pytest-dev/pytest-xdist/issues/1378).
test: .venv/test
	@$(BIN)/python -m deploy.local.stack install
	@$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

chaos: .venv/test
	@$(BIN)/python -m tests.chaos.run --publish both --scorer mix $(if $(SEED),--seed $(SEED)) $(CHAOS)

bench: .venv/test
	@$(BIN)/python -m tests.bench.run $(if $(PEERS),--peers $(PEERS)) $(if $(ONLY),--only $(ONLY))

check: .venv/test
	@$(BIN)/ruff check stream tests deploy
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-cache

train: .venv/test
	$(BIN)/stream train --simulate 9000 --days 730 --seed 11 --out build/shopper
	$(BIN)/stream export build/shopper --into triton_models

clean:
	rm -rf .venv demo build

# Installs the libraries first and the package second, so that each line tells what is happening now.
# $(1): how much it is, in words; $(2): the extras
define install
	@echo 'Installing the libraries $(1), once.'
	@$(INSTALL) --requirement pyproject.toml $(2)
	@echo 'Compiling and installing stream.'
	@$(INSTALL) --no-deps --editable .
endef

.venv/bin/uv: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'stream needs Python 3.11 or newer. Do: make PYTHON=python3.11'; exit 2; }
	@echo 'Creating the Python environment .venv.'
	@$(PYTHON) -m venv .venv || { echo 'Do: install the venv module (Debian: apt-get install python3-venv)'; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	@touch $@

.venv/base: .venv/bin/uv pyproject.toml $(NATIVE)
	$(call install,(about 500 MB),--extra report)
	@touch $@

.venv/test: .venv/bin/uv pyproject.toml $(NATIVE)
	$(call install,and PyTorch (some GB),--extra train --extra test)
	@touch $@ .venv/base
