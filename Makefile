# Needs make and a Python >= 3.11; everything else is installed into a virtual environment of its own.

PYTHON ?= python3
ARGS ?=
TESTS ?=
# One file starts in two seconds in one process; each worker would import JAX first.
WORKERS ?= $(if $(filter 1,$(words $(filter %.py,$(TESTS)))),0,2)

# One environment for each interpreter: .venv for python3, .venv-python3.12 for PYTHON=python3.12.
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(subst /,_,$(PYTHON)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: help train test test-slow lint docs clean

help:
	@echo "make train [ARGS='CONFIG key=value ...']        pretrain (the quickstart without ARGS), then evaluate"
	@echo "make test  [TESTS=tests/x/test_y.py] [ARGS=-x]  the tests, without those that are long or slow"
	@echo "make test-slow  [TESTS=...] [ARGS=...]          the tests that take minutes each, and no others"
	@echo "make lint                                       ruff, what may import what, and types"
	@echo "make docs                                       the pages in docs/ as a site, in build/site"
	@echo "make clean                                      delete environments and caches, not runs"
	@echo "Each installs what it needs first. PYTHON=python3.12 chooses the interpreter (now: $(PYTHON), in $(VENV))."

train: $(STAMP)
	$(BIN)/hybridnorm train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 --durations-min 4 $(TESTS) $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 --durations-min 4 -m slow $(TESTS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf .venv .venv-* .jax_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again by the next make.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c "" 2>/dev/null || \
	    { echo "$(PYTHON) does not run; choose another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "$(PYTHON) is older than Python 3.11; choose another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV); this takes a minute or a few."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@
