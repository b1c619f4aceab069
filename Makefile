# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint types test-all fuzz zoo bench test-gpu train clean

setup: $(STAMP)

# torch first and alone: its pinned build must be in place before anything else asks for "torch".
$(STAMP): pyproject.toml constraints.txt requirements-gpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-gpu.txt
	command -v nvcc >/dev/null || \
		$(BIN)/python -m pip install --quiet -e ".[nvcc]" -c constraints.txt
	touch $@

demo: setup
	$(BIN)/python -m examples.digits.demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: lint types
	$(BIN)/python -m pytest -n 2 -m "not gpu"

N ?= 20000
fuzz: setup
	$(BIN)/python -m tests.fuzz $(N)

zoo: setup
	$(BIN)/python -m tests.zoo_run

bench: setup
	$(BIN)/python -m examples.bench

# GPU_PYTHON is for a machine that has its own torch with CUDA; nothing is installed there.
test-gpu: $(if $(GPU_PYTHON),,setup)
	$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m gpu

train: setup
	$(BIN)/python -m examples.digits.train
	$(BIN)/python -m examples.text.train --pieces 2048

clean:
	rm -rf demo-out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
