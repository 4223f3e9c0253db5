# `make` lists the commands. Everything is installed into .venv; nothing else on the machine changes.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := deploy/constraints.txt
NATIVE := $(wildcard stream/*/*.pyx stream/*/*.pxd) deploy/build_native.py
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS)

.PHONY: help demo up down test chaos bench check train clean
.DELETE_ON_ERROR:

# A compiled module that is gone is made again.
ifneq ($(foreach source,$(wildcard stream/*/*.pyx),$(if $(wildcard $(source:.pyx=.*.so)),,$(source))),)
.PHONY: .venv/base .venv/test
endif

help:
	@echo 'make demo    simulated shoppers to alerts with reasons and a report, on embedded parts'
	@echo 'make up      a real Kafka and Triton, a worker, and simulated shoppers publishing; make down stops them'
	@echo 'make test    all tests (installs torch for the training tests)'
	@echo 'make chaos   kill workers and a broker over a million events, twice, and audit (SEED=n repeats a run)'
	@echo 'make bench   the figures of the README; PEERS=DIR joins the harness of its peers, ONLY=names chooses'
	@echo 'make check   lint and types'
	@echo 'make train   train the shipped model anew and export it into triton_models/'
	@echo 'make clean   remove the environment and what the demo wrote'

demo: .venv/base
	@$(BIN)/stream demo

up: .venv/base
	@$(BIN)/python -m deploy.local.stack up

down: .venv/base
	@$(BIN)/python -m deploy.local.stack down

# Two processes, each with a Kafka and a Triton of its own. A file stays in one of them, so its fixtures are made once.
test: .venv/test
	@$(BIN)/python -m deploy.local.stack install
	@$(BIN)/python -m pytest -n 2 --dist loadfile

chaos: .venv/test
	@$(BIN)/python -m tests.chaos.run --publish both --scorer mix $(if $(SEED),--seed $(SEED)) $(CHAOS)

bench: .venv/test
	@$(BIN)/python -m tests.bench.run $(if $(PEERS),--peers $(PEERS)) $(if $(ONLY),--only $(ONLY))

check: .venv/test
	@$(BIN)/ruff check stream tests deploy
	@$(BIN)/pyright

train: .venv/test
	$(BIN)/stream train --simulate 9000 --days 730 --seed 11 --out build/shopper
	$(BIN)/stream export build/shopper --into triton_models

clean:
	rm -rf .venv demo build

.venv/bin/uv: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'stream needs Python 3.11 or newer. Do: make PYTHON=python3.11'; exit 2; }
	@$(PYTHON) -m venv .venv || { echo 'Do: install the venv module (Debian: apt-get install python3-venv)'; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	@touch $@

.venv/base: .venv/bin/uv pyproject.toml $(NATIVE)
	@echo 'installing into .venv'
	@$(INSTALL) --editable .
	@touch $@

.venv/test: .venv/bin/uv pyproject.toml $(NATIVE)
	@echo 'installing into .venv, with torch for the training tests'
	@$(INSTALL) --editable '.[train,test]'
	@touch $@ .venv/base
