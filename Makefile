# `make demo` and `make test` work on a machine that has python3 and make and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint types examples ci clean

demo: $(VENV)/.examples
	$(BIN)/python -m examples.demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.examples: pyproject.toml constraints.txt $(VENV)/.python
	$(PIP) -e ".[examples]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.python
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV)
