# make demo     from a bare clone to a better model: environment, installation, fine-tuning on the CPU
# make test     install what the tests need and run them all
# make quick    the tests that take seconds          make check    ruff, pyright, import-linter
# make docs     build the documentation site         make bench    measure a training step beside peft
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
JOBS   ?= auto

.PHONY: demo test browser quick check docs bench clean

demo: $(VENV)/.package
	$(BIN)/rankworks demo

test: $(VENV)/.dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# the reports are tested in Debian's Chromium
browser:
	@scripts/browser.sh

quick: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests/core tests/linalg tests/methods tests/plan

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(PIP) -e ".[docs]"
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/train_step.py

# torch is installed first and by an exact version, so that later requirements find it and take no other build
$(VENV)/.package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and rankworks into $(VENV) (a few minutes on a slow line) ..."
	$(PIP) "$(TORCH)"
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package pyproject.toml
	@echo "installing what the tests need ..."
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist site runs .pytest_cache .ruff_cache
