# `make demo` and `make test` work on a fresh machine with Python 3.11 or later: they make .venv and install into it.

PYTHON ?= python3
BIN := .venv/bin

# Idle OpenMP threads sleep instead of spinning: on shared or small machines that is the faster choice.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: demo test test-slow real lint bench bench-peers study figures docs models clean help

demo: .venv/installed ## find, draw and use the circuit of the shipped model -> runs/demo
	$(BIN)/madcap demo out=runs/demo overwrite=true

test: .venv/installed ## the test suite
	$(BIN)/python -m pytest

test-slow: .venv/installed ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

real: .venv/installed ## the tests on a language model of 135 M parameters, which is fetched (93 MB) into ~/.cache
	$(BIN)/python -m tests.real.smollm2
	$(BIN)/python -m pytest -m real -n0

lint: .venv/installed ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/installed ## time the engine, and discovery beside a peer
	$(BIN)/madcap bench suite=engine
	$(MAKE) bench-peers

bench-peers: .venv/installed .venv-peers/installed ## time discovery beside auto-circuit, in an environment of its own (2.3 GB)
	$(BIN)/madcap bench suite=peers threads=1

study: .venv/installed ## which detectors tell anomalies from normals -> runs/detectors (half an hour; STORIES=folder of stories260K)
	$(BIN)/madcap bench suite=detectors out=runs/detectors $(if $(STORIES),benchmark.natural=$(STORIES))

figures: .venv/installed ## redraw every published figure
	@set -e; for figure in figures/*.py; do \
	  [ -e "$$figure" ] || continue; echo "$$figure"; $(BIN)/python "$$figure"; done

docs: .venv/installed ## measure every architecture again -> docs/architectures.md
	$(BIN)/python -m tests.architectures

models: .venv/installed ## train the shipped model again
	$(BIN)/madcap train task=recall_redirect out=mad/models/recall_redirect overwrite=true

clean: ## remove .venv, .venv-peers and every cache; runs/ stays
	rm -rf .venv .venv-peers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch comes first, so that an index of CPU wheels can be chosen for it alone (PIP_EXTRA_INDEX_URL).
# The stamp is written last: an interrupted installation is done again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

# The peer needs Python 3.11 or 3.12; PEERS_PYTHON names one where PYTHON is another.
.venv-peers/installed: mad/benchmark/peers.txt
	$(or $(PEERS_PYTHON),$(PYTHON)) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q torch==2.13.0
	.venv-peers/bin/python -m pip install -q -r $<
	@touch $@
