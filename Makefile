PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test check

# Hides a number in a long real file and asks the bundled model for it.
demo: $(INSTALLED)
	$(BIN)/python examples/passkey.py

test: check
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,dev]"
	touch $(INSTALLED)
