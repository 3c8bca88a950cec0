# `make` or `make help` lists what there is. Everything runs inside .venv, which the first target makes; with
# PYTHON=python3.13 it is .venv-python3.13.
PYTHON ?= python3
VENV   ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN    := $(VENV)/bin
# One more than there are cores: some tests wait for others.
PYTEST := -m pytest -n $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1))) --dist worksteal


.PHONY: help demo test slow faults fuzz lowest golden lint docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/perceiver: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(BIN)/perceiver  ## install, then train, evaluate and predict on scikit-learn's handwritten digits
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart.sh

test: $(BIN)/perceiver  ## install, then run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

slow: $(BIN)/perceiver  ## install, then run the slow tests: pages, examples, exports, benchmarks, growth
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow

faults: $(BIN)/perceiver  ## install, then inject faults by force for ten minutes; with ARGS=--sample a few
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

fuzz: $(BIN)/perceiver  ## install, then fuzz each parser for ten minutes; with ARGS='--seconds 60 ply off' two for one
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

lowest:  ## install the lowest versions of dependencies that pyproject.toml allows in .venv-lowest, then run the suite
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[test]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python $(PYTEST) -W ignore::DeprecationWarning  # of new packages below old ones

golden: $(BIN)/perceiver  ## record hashes of models, records and answers, to compare before and after refactoring
	$(BIN)/python tests/golden/record.py golden.json

lint: $(BIN)/perceiver  ## install, then ruff and mypy --strict
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/ruff format --check src tests examples benchmarks docs
	$(BIN)/mypy

docs: $(BIN)/perceiver  ## install, then build the documentation, warnings as errors: docs/_build/index.html
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

bench: $(BIN)/perceiver  ## install, then measure this package and others side by side, in about three minutes
	$(BIN)/python -m benchmarks.contest tiny-image --against usual,perceiver-pytorch,onnxruntime --rounds 2 --seconds 1
	$(BIN)/python -m benchmarks.contest tiny-image --against usual,perceiver-pytorch --mode train --batch-size 64 --rounds 2 --seconds 1
	$(BIN)/python -m benchmarks.contest imagenet --against usual --rounds 1 --seconds 1
	$(BIN)/python -m benchmarks.loaders --rounds 1 --seconds 2
	$(BIN)/python -m benchmarks.records --rounds 1 --seconds 2 --records 10000

clean:  ## remove the virtual environment, caches and what the demo made
	rm -rf .venv .venv-* demo build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
