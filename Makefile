# `make demo` and `make test` do all their set-up; both reuse the virtual environment once it is built.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?=
JOBS ?= 2

.PHONY: demo test test-slow lint clean

demo: $(STAMP)
	$(BIN)/hf-ema-scaling demo $(DEMO_ARGS)

test: $(STAMP) lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" tests

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow tests

lint: $(STAMP)
	$(BIN)/ruff check hf_ema_scaling recipes scripts tests
	$(BIN)/ruff format --check hf_ema_scaling recipes scripts tests
	$(BIN)/mypy
	$(BIN)/lint-imports

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade --quiet pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
