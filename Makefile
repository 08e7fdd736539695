# The whole interface for developing, and for trying birthmark out; CI calls the same targets.
#
#   make demo                    the whole mission on this machine, in about half a minute
#   make test                    every test
#   PYTHON=python3.12 VENV=.venv-3.12 make test     on another Python, in an environment of its own
#   PYTEST='-m "not proof"' make test               with options for pytest

PYTHON ?= python3
VENV ?= .venv
SECONDS ?= 600

ifneq ($(words $(VENV)),1)
$(error VENV must be one path without spaces)
endif

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input -c constraints.txt
INPUTS := pyproject.toml constraints.txt
# An environment is stale when one of the inputs is newer than its stamp. `dev` is a superset of `run`.
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help dev check test demo bench bench-quick proof soak clean
.SUFFIXES:

help:
	@echo "make demo    a station, a broker and three simulated boards: enrolled, online, one revoked"
	@echo "make test    every test"
	@echo "make check   ruff, formatting and types"
	@echo "make bench   birthmark beside Mosquitto and stock amqtt, as ratios; make bench-quick for less"
	@echo "make proof   the long proofs, whole; leaves proof.md"
	@echo "make soak    a gateway under everything at once, ten minutes; SECONDS=60 make soak for less"
	@echo "make dev     only the development environment, in $(VENV)"
	@echo "make clean   remove the environment and everything generated"

dev: $(DEV)

# What the demo needs, and no more. Progress goes to stderr: `DEMO=json make demo` has JSON alone on stdout.
$(RUN): $(INPUTS)
	@sh tools/environment '$(PYTHON)' '$(VENV)'
	@echo "birthmark: installing into $(VENV) (once; under a minute)" >&2
	@$(INSTALL) -e '.[broker,device,sim,station]' >&2
	@touch $(RUN)

$(DEV): $(INPUTS)
	@sh tools/environment '$(PYTHON)' '$(VENV)'
	@echo "birthmark: installing into $(VENV) with the tools for development (once; about a minute)" >&2
	@$(INSTALL) -e '.[dev]' >&2
	@touch $(RUN) $(DEV)

check: $(DEV)
	@echo "birthmark: ruff check, ruff format --check, mypy" >&2
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

# More workers than cores: much of a test's time is waiting. Each takes its neighbours, and makes what they share once.
test: $(DEV)
	@$(BIN)/python -m pytest -q -n 6 --dist worksteal $(PYTEST)

# The proofs are in the suite too, at a quick count; here each runs whole. Leaves proof.md, a page of what was proven.
proof: $(DEV)
	@BIRTHMARK_PROOF=whole $(BIN)/python -m pytest -q -n 4 --dist worksteal -m proof --timeout 1200 \
		-p support.proof_report --proof-report proof.md

# Leaves soak.svg, a page of curves.
soak: $(DEV)
	@cd tests && $(abspath $(BIN))/python -m support.soak --seconds $(SECONDS) --report $(CURDIR)/soak.svg

demo: $(RUN)
	@$(BIN)/python -m demo.run

# Leaves bench.json and bench.svg. A quarter of an hour; bench-quick takes a minute, and says less.
bench: $(DEV)
	@$(BIN)/python -m bench --json bench.json --svg bench.svg

bench-quick: $(DEV)
	@$(BIN)/python -m bench --quick --json bench.json --svg bench.svg

clean:
	@rm -rf .venv .venv-* build dist demo-run soak.svg bench.json bench.svg proof.md birthmark.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
