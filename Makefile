# longtail: `make quickstart` runs the whole pipeline on a world that it draws itself; `make test` runs the checks.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# `make test SLOW=1` runs the tests marked slow as well, as CI does.
MARKERS := $(if $(SLOW),,-m "not slow")
# Processes that share the tests, file by file; 0 runs them in one.
JOBS ?= 2

.PHONY: quickstart test lint environment clean

quickstart: $(STAMP)
	$(BIN)/longtail run recipes/quickstart_pretrain.yaml recipes/quickstart.yaml

test: lint
	$(BIN)/python -m pytest $(MARKERS) -n $(JOBS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

environment: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "longtail needs Python 3.11 or newer; say which with PYTHON=python3.12"; exit 78; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@echo "installing pinned packages into $(VENV) (about 7 GB with CUDA libraries; some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs miniature .pytest_cache .mypy_cache .ruff_cache
