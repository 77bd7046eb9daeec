# Every target makes its own .venv when there is none.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo doctor gpu-check test test-all lint types install clean

help: ## list all targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: install ## distil ten images from embedded digits, half a minute
	$(BIN)/dd-distill experiment=demo

doctor: install ## say what is installed, what is there and what is broken, for a bug report
	$(BIN)/dd-doctor

gpu-check: install ## all that the CUDA paths promise, in eight minutes on one GPU
	$(BIN)/dd-doctor --gpu

test: install ## run the tests (a few minutes)
	$(BIN)/pytest -n auto

test-all: install ## run the tests, slow ones too
	$(BIN)/pytest -n auto -m ""

lint: install ## check style, formatting and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

install: .venv/installed ## make .venv

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean: ## remove .venv and caches
	rm -rf .venv .pytest_cache .ruff_cache
