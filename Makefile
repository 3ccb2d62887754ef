# Every command of the project; `make` alone lists them. Nothing needs to be installed before:
# a command that needs the environment makes it (.venv), once.
#
#   PYTHON=python3.13    the interpreter to build the environment from (>= 3.11)
#   TORCH_INDEX=URL      the package index to take torch from (see tools/setup.sh)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
RUNTIME := .venv/.runtime
DEV := .venv/.dev
DOCS := .venv/.docs
INTEROP := .venv/.interop
PINS := pyproject.toml constraints.txt tools/setup.sh
ARGS ?=

export PYTHON TORCH_INDEX

.PHONY: help setup demo test laws interop golden fmt lint type layers spell house ci bench docs reference pins clean

help:            ## list these commands
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile

$(RUNTIME): $(PINS)
	@tools/setup.sh runtime
	@touch $@

$(DEV): $(RUNTIME)
	@tools/setup.sh dev
	@touch $@

setup: $(DEV)    ## make the environment .venv, with the developer's tools
	@echo 'ready: source .venv/bin/activate   (then the command is moesaic)'

demo: $(RUNTIME) ## train a small multilingual MoE on real text and translate with it
	$(BIN)/moesaic demo --out runs/demo $(ARGS)
	@echo
	@echo 'next:  source .venv/bin/activate   (then the command is moesaic; without it: $(BIN)/moesaic)'

test: $(DEV)     ## run the whole suite (ARGS="-k router" for a part)
	$(BIN)/python -m pytest $(ARGS)

laws: $(DEV)     ## run the laws alone
	$(BIN)/python -m pytest tests/laws $(ARGS)

$(INTEROP): $(DEV)
	@tools/setup.sh interop
	@touch $@

interop: $(INTEROP)  ## run the tests that compare with transformers, PEFT and llama.cpp
	$(BIN)/python -m pytest tests/exchange $(ARGS)

golden: $(DEV)   ## rewrite the golden files after an intended change
	MOESAIC_WRITE_GOLDEN=1 $(BIN)/python -m pytest tests/test_recipes_golden.py

fmt: $(DEV)      ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(DEV)     ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(DEV)     ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(DEV)   ## check that imports go downward only
	$(BIN)/lint-imports

spell: $(DEV)    ## check spelling
	$(BIN)/codespell

house: $(DEV)    ## print the measured table of the code and check its limits
	$(BIN)/python tools/house.py

ci: lint type layers spell house  ## every check but the tests

bench: $(DEV)    ## run the benchmarks; each prints a table and writes JSON
	for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

$(DOCS): $(DEV)
	@tools/setup.sh docs
	@touch $@

docs: $(DOCS)  ## write the guide and the API reference as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo 'site/index.html'

reference: $(DEV)  ## write docs/family.md and the measured table in CONTRIBUTING.md
	$(BIN)/python tools/family.py
	$(BIN)/python tools/house.py --write-contributing

pins: $(DEV)     ## write constraints.txt from what is installed
	$(BIN)/python tools/pins.py > constraints.txt.new && mv constraints.txt.new constraints.txt

clean:           ## remove the environment and the caches; runs and data stay
	rm -rf .venv site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +
