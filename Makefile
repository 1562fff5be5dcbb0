# make venv    virtual environment in .venv with what requirements.lock holds, by sha256; the other targets make it first
# make demo    real images → shards → DINOv2 and SimCLR on two processes → kNN and a picture
# make test    lint, types and all tests
# make lint    style and types only
# make lock    requirements.lock anew, after a change of setup.cfg (tests/lock.py)
#
# Needs Python 3.11 or 3.12 with pip, make and g++. Another interpreter: make venv PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
STAMP := .venv/.installed

.PHONY: venv demo test lint lock clean

venv: $(STAMP)

# A Python without ensurepip (Debian without python3-venv) gets its pip from the system's pip. What builds packages comes
# first, so that none is built with anything that is not in the lock.
$(STAMP): setup.cfg setup.py pyproject.toml requirements.lock shards/_kernel.c shards/_files.c
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "scaler needs Python 3.11 or 3.12; name one with PYTHON=…" >&2; exit 1; }
	if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
		$(PYTHON) -m venv .venv && pip="$(PIP)"; else \
		$(PYTHON) -m venv --without-pip .venv && pip="$(PYTHON) -m pip --python $(BIN)/python"; fi && \
		sed '/^# \[run\]/,$$d' requirements.lock > .venv/build.lock && \
		$$pip install --require-hashes -r .venv/build.lock
	$(PIP) install --require-hashes --no-build-isolation -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/scaler demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: the tests start processes of their own, and wait for them a good part of the time, so that three
# workers keep two cores busy. A file's tests stay on one worker and share its fixtures; tests/conftest.py orders the files.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lock: $(STAMP)
	$(BIN)/python -m tests.lock $(UPGRADE)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
