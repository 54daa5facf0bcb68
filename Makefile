PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test compiler check bench

# Hides a number in long real files and asks the bundled model for it.
demo: $(INSTALLED)
	$(BIN)/python examples/passkey.py

# A file's tests stay in one process: what they compile is compiled once.
test: compiler check
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# Measures Kvell beside transformers and against the machine; QUICK=1 takes four to five minutes, without it under forty.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(if $(FOLDER),--folder $(FOLDER))

# What torch compiles with, too: g++ (clang++ on a Mac), or what CXX names in the environment.
compiler:
	@$(if $(shell ($(CXX) --version) > /dev/null 2>&1 && echo works),,$(error the tests need a C++ compiler, and $(CXX) does not run here: install g++, or name another in the environment's CXX))

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,dev]"
	touch $(INSTALLED)
