# make demo       set everything up and run the demonstration
# make quick      set everything up, run the strongest tests: about 80 seconds
# make test       set everything up, check style and types, run all tests but the slow ones
# make test-slow  run the tests that take longer
# make test-triton run the fused head's kernels in Triton's interpreter, which is installed for that: 1 GB
# make lint       style and types only
# make docs       write the site of documentation to site/, refuse broken links, check the Dockerfile
#
# Everything is installed into .venv in this folder; PYTHON names another interpreter than python3.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep "^torch==" constraints.txt)

# One thread per test process: tensors in tests are small, and two processes use two cores better than threads do. A
# worker that has nothing left takes over tests of another. Compiled tests and modules are kept, also where a container
# forbids it: each worker and each program that a test starts would compile them again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo quick test test-slow test-triton lint docs setup clean

demo: setup
	$(BIN)/python -m prefopt demo

quick: setup
	$(PYTEST) -m "not slow and not gpu" @tests/quick.txt

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-slow: setup
	$(PYTEST) -m slow

test-triton: setup
	$(BIN)/python -m pip install --quiet --no-deps "triton>=3.4"
	$(PYTEST) tests/model/test_head_triton.py

docs: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable ".[docs]"
	$(BIN)/hadolint Dockerfile
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy --strict src

setup: $(READY)

# Written last, so that an interrupted set-up is taken up again. The cost of a set-up with nothing to do is none.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null || echo "not there"); \
	  echo "error: prefopt needs Python 3.11 or newer, and $(PYTHON) is $$found: name another by make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): the first time takes some minutes."
	@# torch first and by itself, so that its processor-only build is taken where one is offered
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
