PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test check

# Continues a long real file that the bundled model was not trained on.
demo: $(INSTALLED)
	$(BIN)/kvell generate --prompt-file "$$($(BIN)/python -c 'import argparse; print(argparse.__file__)')" \
		--max-new-tokens 200 --temperature 0.6 --top-p 0.95

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
