# `make demo` and `make test` do all the set-up they need on a fresh machine (Python >= 3.11).
PYTHON ?= python3
VENV ?= .venv
LAB_OPTIONS ?=
BUNDLE_OPTIONS ?=
BIN := $(VENV)/bin
COVERAGE := import sys; print("--cov --cov-report=term" if sys.version_info >= (3, 12) else "")
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

CONSTRAINTS := --constraint constraints.txt

.PHONY: demo test test-fast test-newest lab lint site compiled bundle constraints clean

# The main job on an embedded data set, at three budgets: no download, about a minute after installation.
demo: $(VENV)/.demo
	rm -rf runs/digits/demo
	$(BIN)/dpnb run digits/demo

# Style and types, which `make test` looks at too.
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything: style, types, library, documentation examples, notebooks; and how much of the library the tests reach,
# subprocesses not counted, from Python 3.12 on (before, counting would take more than half as long again).
test: $(VENV)/.test
	$(BIN)/python -m pytest -q $(WORKERS) --durations=15 $$($(BIN)/python -c '$(COVERAGE)')
	@$(BIN)/python -c 'import sys; sys.version_info >= (3, 12) or print("coverage: measured from Python 3.12 on")'

# What takes long is left out: under three minutes on two cores once compiled programs are cached.
test-fast: $(VENV)/.test
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow and not notebook and not distributed"

# The same tests with the newest packages that pyproject.toml allows, in an environment of their own.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# What accelerators would be given, compiled without one. The compilers (4.5 GB) have a folder of their own.
compiled: $(VENV)/.test .compilers/.installed
	$(BIN)/python benchmarks/compiled.py

.compilers/.installed: constraints.txt | $(VENV)/.test
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .compilers \
		$$($(BIN)/python benchmarks/compiled.py --requirements)
	touch $@

# All that a machine without a network needs, in the folder `bundle`: see benchmarks/bundle.py for the options.
bundle: $(VENV)/.demo
	$(BIN)/python -m pip install -q uv
	$(BIN)/python benchmarks/bundle.py bundle $(BUNDLE_OPTIONS)

# The documentation as a static site in the folder `site`: from what is committed, nothing executed, no network.
site: $(VENV)/.site
	$(BIN)/python docs/site/build.py site

lab: $(VENV)/.lab
	$(BIN)/jupyter lab $(LAB_OPTIONS) notebooks

# The newest packages that pyproject.toml allows on every Python it allows: what the other targets install.
constraints: $(VENV)/bin/python
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --all-extras --no-annotate --upgrade \
		--custom-compile-command 'make constraints' pyproject.toml -o constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[site,test]'
	touch $@ $(VENV)/.demo $(VENV)/.site

$(VENV)/.site: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[site]'
	touch $@ $(VENV)/.demo

$(VENV)/.lab: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[lab]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .venv-newest .compilers build dist site *.egg-info
