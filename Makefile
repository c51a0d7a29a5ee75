# One target a habit; every target may be run first, and again.
PYTHON ?= python3
BIN := .venv/bin

CORE := $(patsubst %,tests/test_%.py,networks closed_form interpolant flowmap sampling weight_files rewards lent) \
	$(patsubst %,tests/steering/test_%.py,weights steering noise_search tree_search) \
	tests/cli/test_config.py tests/cli/test_cli.py tests/training/test_training.py tests/finetuning/test_base.py

WORKERS := -n 2 --dist worksteal
# Each takes half, file by file: what the tests of a file share is made once, and not by both.

.PHONY: demo quick test test-lowest lint bench bench-check data docs clean
.DEFAULT_GOAL := demo

demo: .venv/installed  ## install, then steer the shipped model with four methods: a table and a picture
	$(BIN)/python examples/demo.py

test: .venv/dev  ## fetch the data that tests read, where that can be done and STEERFM_DATA hides none; the tests, in parallel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --fetch $(TESTS)  # one thread a worker: more would fight for the cores

quick: .venv/dev  ## the tests but the slow ones and those that need a network or an accelerator: two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m 'not slow and not net and not gpu' $(TESTS)

test-lowest: .venv-lowest/installed  ## the quick tests of the core, with the lowest versions that pyproject.toml admits
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(WORKERS) $(CORE) -o filterwarnings=default -m 'not slow' -k 'not train-emoji'  # those recipes need extras

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

docs: .venv/dev  ## the site, into site/: a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html; $(BIN)/mkdocs serve shows it while you write"

clean:
	rm -rf .venv .venv-lowest runs site

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

.venv-lowest/installed: pyproject.toml tests/lowest.py
	@echo "installing the lowest versions into .venv-lowest (torch is large: minutes)"
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install -q --no-deps -e .
	.venv-lowest/bin/python tests/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install -q -e . pytest pytest-xdist hypothesis scipy mpmath -c .venv-lowest/constraints.txt
	@touch $@
