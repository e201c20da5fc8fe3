# Two commands matter: `make demo` and `make test`. Each sets up everything it needs.
PYTHON ?= python3
# The torch build. For a GPU: make demo TORCH="torch==2.13.0 --index-url <the CUDA index that pytorch.org names>"
TORCH ?= torch==2.13.0

BIN := .venv/bin
# Two spinning OpenMP threads run up to ten times slower when another process takes a core.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow check setup clean
demo: setup
	$(BIN)/datablame demo

# One thread in each of as many processes as there are cores: most tests are too small for threads.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt tests/oracles.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "datablame needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps -r tests/oracles.txt
	@touch $@

clean:
	rm -rf .venv demo-out
