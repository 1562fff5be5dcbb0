# make venv    virtual environment in .venv with the tested versions (constraints.txt); the other targets make it first
# make demo    real images → shards → DINOv2 and SimCLR on two processes → kNN and a picture
# make test    lint, types and all tests
# make lint    style and types only
#
# Needs Python 3.11 or newer with pip, make and g++. Another interpreter: make venv PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv demo test lint clean

venv: $(STAMP)

# A Python without ensurepip (Debian without python3-venv) gets its pip from the system's pip.
$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt shards/_kernel.c shards/_files.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "scaler needs Python 3.11 or newer; name one with PYTHON=…" >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv .venv; else \
		$(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; fi
	$(BIN)/python -m pip install -e ".[test]" -c constraints.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/scaler demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: the tests start processes of their own. A file's tests stay on one worker and share its fixtures.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
