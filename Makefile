# The Python to build .venv with, 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup demo test check bench clean

help:
	@echo "make demo    install, then run the starter study and show what tuning bought"
	@echo "make test    install, then run every test"
	@echo "make setup   only .venv and the installation"
	@echo "make check   ruff and mypy"
	@echo "make bench   Trimtab beside Trainer + peft (over an hour on two cores)"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/trimtab run

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadgroup

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
