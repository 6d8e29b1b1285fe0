# `make demo` and `make test` do all their set-up; both reuse the virtual environment once it is built.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?=
JOBS ?= 2
# The lowest versions that pyproject.toml allows, with the extras that users install.
LOWEST ?= .venv-lowest
EXTRAS := demo,report,asterisk,byol,peft

.PHONY: demo test test-slow test-lowest lint clean

demo: $(STAMP)
	$(BIN)/hf-ema-scaling demo $(DEMO_ARGS)

test: $(STAMP) lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" tests

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow tests

test-lowest: $(LOWEST)/.installed
	HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest -m "not slow and not distributed" $(addprefix tests/,scaling ema training)

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

$(LOWEST)/.installed: pyproject.toml scripts/lowest_versions.py
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python scripts/lowest_versions.py --extras $(EXTRAS) > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet -r $(LOWEST)/lowest.txt pytest hypothesis
	$(LOWEST)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
