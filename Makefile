# `make quickstart` and `make test` work on a fresh machine with Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet

# A test computes with one thread: files of tests run side by side, in the order of tests/conftest.py.
PYTEST = python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-all test-oldest check docs format bench golden clean

quickstart: $(VENV)/installed
	$(BIN)/latentloom quickstart $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/$(PYTEST) $(ARGS)

test-all: $(VENV)/installed-dev
	$(BIN)/$(PYTEST) -m "slow or not slow" $(ARGS)

# The lowest versions that pyproject.toml allows, in an environment of their own. The peers of the benchmarks need newer ones.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) scripts/lowest_versions.py > .venv-oldest/lowest.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/lowest.txt --editable ".[dev]"
	.venv-oldest/bin/$(PYTEST) $(ARGS)

check: $(VENV)/installed-dev docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation, in docs/_build/html: no network is needed, and a warning is an error.
docs: $(VENV)/installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Peers side by side; QUICK=1 takes a first look, some minutes long, and writes nothing. ARGS names single ones.
bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick) $(ARGS)

# The losses of the first steps of every recipe, which the tests compare with.
golden: $(VENV)/installed-dev
	$(BIN)/python scripts/golden_losses.py

clean:
	rm -rf $(VENV) .venv-oldest build dist docs/_build docs/reference/api docs/reference/_generated .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit('latentloom needs Python 3.11 or newer; found ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing latentloom and what it needs into $(VENV) (torch is large: minutes on a slow line)"
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable ".[bench,dev]"
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) --editable ".[bench]"
	@touch $@
