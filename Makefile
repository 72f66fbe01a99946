# Everything a fresh machine needs is Python >= 3.11 with pip; `make` alone lists the targets.
# Without a GPU, PyTorch's own index has a smaller build of the same version:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV   ?= .venv

BIN   := $(VENV)/bin
TESTS := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
STAMP := $(VENV)/.installed

# The benchmark's own environment, with the trainers that it compares with; a machine that has torch and no network
# names its Python instead: make bench-gpu BENCH_PYTHON=python3
BENCH_VENV   := benchmarks/.venv
BENCH_STAMP  := $(BENCH_VENV)/.installed
BENCH_PYTHON ?= $(BENCH_VENV)/bin/python
BENCH_NEEDS  := $(if $(filter $(BENCH_VENV)/bin/python,$(BENCH_PYTHON)),$(BENCH_STAMP))
BENCH_GPU    := PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True OMP_NUM_THREADS=8 $(BENCH_PYTHON) -m benchmarks --device cuda --bf16

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow examples bench bench-gpu check clean

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

bench: $(BENCH_NEEDS) ## speed and memory against other trainers, on two CPU cores in some 15 minutes
	@$(BENCH_PYTHON) -m benchmarks --halves --out benchmarks/results/cpu.json

bench-gpu: $(BENCH_NEEDS) ## the same on one H100-class GPU, with LLaVA-1.5-7B and Qwen2.5-VL-7B shapes, in at most 9 minutes
	@$(BENCH_GPU) --shape llava-1.5-7b --factor 8 --minutes 4.5 --out benchmarks/results/gpu-llava.json \
	  --only memory shared single mixed captions-lora asking levers
	@$(BENCH_GPU) --shape qwen2.5-vl-7b --gate-shape tiny-qwen --factor 8 --minutes 0.5 --only shared single \
	  --out benchmarks/results/gpu-qwen.json

$(BENCH_STAMP): benchmarks/requirements.txt constraints.txt pyproject.toml
	@test -x $(BENCH_VENV)/bin/pip || $(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/pip install --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(BENCH_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . -r benchmarks/requirements.txt
	@touch $@

check: setup ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what was built and cached; runs and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
