# A bare machine needs python3 (3.11 or newer) and make. Every target builds .venv first, once.

# For pipefail.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Several test processes share the cores: one thread each, or they wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help env demo test check lint fix fuzz test-gpu sanitize bench bench-gpu docs clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      calibrate, export and run every mode on the bundled model; ends in one table'
	@echo 'make test      the tests'
	@echo 'make check     lint, formats, types and the tests: what CI runs'
	@echo 'make fuzz      artifacts against 200 kills a stage and 20 000 mutations a reader, new random examples; takes long'
	@echo 'make fix       format, and mend what the linter can'
	@echo 'make test-gpu  the tests that need a GPU; fails if one of them was skipped'
	@echo 'make sanitize  the GPU tests of the kernels under compute-sanitizer, memcheck and racecheck'
	@echo 'make bench     speed against transformers, and time by operator'
	@echo 'make bench-gpu  the CUDA kernels against their floors, goals and peers'
	@echo 'make docs      write docs/cli.md and docs/modes.md again'
	@echo 'make clean     remove caches, builds and the demo folder; .venv stays'

env: $(STAMP)

# torch goes first, by its exact pin: chosen as the dependency of another package it may come as another build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: \`$(PYTHON)\` is $$($(PYTHON) -V 2>&1), expected Python 3.11 or newer"; \
		  echo; echo "hint: make PYTHON=python3.12 …"; exit 1; } >&2
	@echo 'building $(VENV), a few minutes the first time'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/qmamba demo

test: $(STAMP)
	@$(PYTEST)

check: lint test

# Random examples each time; what it finds is printed as a test of its own.
fuzz: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load tests/robustness --kills 200 --fuzz-examples 20000
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load tests -m hypothesis --hypothesis-profile=default

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

fix: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# A skipped test is a failure here: on a GPU machine every one of them can run.
test-gpu: $(STAMP)
	@set -o pipefail; $(BIN)/python -m pytest -m gpu | tee $(VENV)/gpu-tests.txt
	@if tail -n 1 $(VENV)/gpu-tests.txt | grep -q skipped; then \
		echo 'error: GPU tests were skipped, got the reasons above, expected all of them to run' >&2; exit 1; fi

# Fails unless tests ran under the tools and nothing was reported; `tests/sanitize.py` says how.
sanitize: $(STAMP)
	@$(BIN)/python tests/sanitize.py

bench-gpu: $(STAMP)
	@$(BIN)/python benchmarks/gpu.py

bench: $(STAMP)
	@$(BIN)/python benchmarks/run.py

docs: $(STAMP)
	@$(BIN)/python docs/generate.py

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist demo-out sanitize-out
	find src tests benchmarks docs calib_data -name __pycache__ -type d -prune -exec rm -rf {} +
