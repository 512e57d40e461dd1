# Two commands do all of their own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tested versions; some of them need CPython 3.11, and with 3.10 pip chooses.
PINS := $(shell $(PYTHON) -c 'import sys; print("--constraint constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: demo test test-all arm lint docs clean

demo: $(VENV)/ready
	$(BIN)/mobileqat train digits_dscnn_w8a8

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"

# The emulated ARM system, into the cache; without it its tests skip.
arm: $(VENV)/ready
	$(BIN)/python -m mobileqat.bench.sysroot

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, into site/; nothing is fetched while it is built or read.
docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) --editable ".[dev,docs,tfmot]"
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
