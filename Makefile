# Two commands do everything on a fresh machine with Python 3.11 and make: `make run` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: run test lint lock clean

run: .venv/ready  ## train the first paper's arms over five seeds and print the verdict
	$(BIN)/regimen run unipic2

test: .venv/ready lint  ## everything that CI checks
	$(BIN)/pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch is installed first and by its exact version, so that no other package chooses one.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

lock: .venv/ready  ## write down the versions that are installed
	(head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | grep -v '^regimen' | sed 's/+cpu$$//') > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
