# One target a habit; every target may be run first, and again.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-check data clean
.DEFAULT_GOAL := demo

demo: .venv/installed  ## install, then steer the shipped model with four methods: a table and a picture
	$(BIN)/python examples/demo.py

test: .venv/dev  ## fetch the data that tests read, where that can be done and STEERFM_DATA hides none; the tests, in parallel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --fetch $(TESTS)  # one thread a worker: more would fight for the cores

lint: .venv/dev  ## style, types and layers
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/installed  ## five methods at equal cost, then what the library adds to the bare network and reward calls
	$(BIN)/steerfm bench quick
	$(BIN)/steerfm bench speed

bench-check: .venv/installed  ## fail where an overhead is more than 10% above the committed one
	OMP_NUM_THREADS=1 $(BIN)/steerfm bench speed --steps 4 --repeats 4 --check benchmarks/results/speed.json

data: .venv/installed  ## the training data: Fashion-MNIST from a Debian package, captioned emoji from npm packages
	$(BIN)/python tests/fetch.py

clean:
	rm -rf .venv runs

.venv/bin/python:
	@echo "creating .venv"
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "installing steerfm into .venv (torch is large: minutes)"
	$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/dev: .venv/installed
	@echo "installing the development tools"
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@
