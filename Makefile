# Everything a fresh machine needs is Python >= 3.11 with pip; `make` alone lists the targets.
# Without a GPU, PyTorch's own index has a smaller build of the same version:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV   ?= .venv

BIN   := $(VENV)/bin
TESTS := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow examples check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the pinned versions (again only when they change)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "[1/3] virtual environment $(VENV), of $$($(PYTHON) --version)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { echo "Python's venv module is missing (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "[2/3] PyTorch (the largest download)"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "[3/3] peft-mllm and its tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Done: $(BIN)/peft-mllm, or 'source $(BIN)/activate' and then 'peft-mllm'"

demo: setup ## fine-tune and compare methods on a tiny model, on any CPU, in minutes
	@$(BIN)/peft-mllm demo

test: setup ## run the tests
	@$(TESTS)

test-slow: setup ## run the tests that take longer: every model with every method, really fresh processes
	@$(TESTS) -m slow

examples: setup ## run the examples, in a folder of their own
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/run_all.sh

check: setup ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what was built and cached; runs and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
