# One command each; all of them make .venv if it is missing and install what they need, once per change of pyproject.toml.
#
#   make demo   prune a small network on real images in several ways, and compare them
#   make test   the test suite
#
# Settings: PYTHON (interpreter for .venv), JOBS (test processes), ARGS (handed on to the command),
# PIP_INSTALL_ARGS (for pip, e.g. an index with CPU-only builds of torch).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
ARGS ?=
PIP_INSTALL_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# One thread per process: the tests run JOBS processes, and timings are of one thread.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz ledger goldens lint format types contracts docs commands notebooks outputs pictures dist bench check clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.installed-test
	$(PYTEST) -n $(JOBS) -m "not slow" $(ARGS)

#   make test-all   the test suite with the tests marked slow
test-all: $(VENV)/.installed-test
	$(PYTEST) -n $(JOBS) $(ARGS)

#   make fuzz   the laws of ARCHITECTURE.md, section 8, on thousands of random networks
fuzz: $(VENV)/.installed-test
	$(PYTEST) -n $(JOBS) tests/properties --hypothesis-profile=fuzz $(ARGS)

#   make ledger   more random networks, written down: ARGS="--frontend export --shards 0-9"; see tests/properties/ledger.py
ledger: $(VENV)/.installed-test
	$(BIN)/python -m tests.properties.ledger $(ARGS)

#   make goldens   write the golden files anew; read the diff before committing it
goldens: $(VENV)/.installed-test
	STP_FX_GOLDENS=update $(PYTEST) tests -k golden $(ARGS)

#   make lint, make types, make contracts   ruff and the words (docs/prose.py), pyright, import-linter; make check: all three
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/prose.py

#   make format   let ruff rewrite what it can
format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev $(VENV)/.installed-test $(VENV)/.installed-demo $(VENV)/.installed-benchmark
	$(BIN)/pyright

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

check: lint types contracts

#   make docs   the documentation's site, into out/site; a warning is an error
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

#   make commands   every command that the README and the tutorials name, long ones in the short form that the page gives
commands: $(VENV)/.installed-test $(VENV)/.installed-demo $(VENV)/.installed-benchmark $(VENV)/.installed-yolo
	$(ONE_THREAD) $(BIN)/python docs/run.py commands $(ARGS)

#   make notebooks   the pages that have Python as notebooks, into out/notebooks
notebooks: $(VENV)/pyvenv.cfg
	$(BIN)/python docs/notebooks.py $(ARGS)

#   make outputs   write what the pages' Python prints into the pages; read the diff before committing it
outputs: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python docs/run.py update $(ARGS)

#   make pictures   the pictures of docs/pictures.md (needs Graphviz)
pictures: $(VENV)/.installed-demo $(VENV)/.installed-test
	$(BIN)/python docs/make_pictures.py $(ARGS)

#   make dist   the sdist and the wheel, into dist, and what a package index would say of them
dist: $(VENV)/.installed-release
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

#   make bench   both benchmarks, into benchmarks/results (about an hour; see CONTRIBUTING.md for parts of it)
bench: $(VENV)/.installed-benchmark
	$(BIN)/python benchmarks/coverage.py torchvision $(ARGS)
	$(BIN)/python benchmarks/engine.py $(ARGS)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "stp-fx needs Python 3.10 or newer, '$(PYTHON)' is not: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per extra. PyTorch is large: the first install may download gigabytes.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install $(PIP_INSTALL_ARGS) --editable ".[$*]"
	@touch $@
