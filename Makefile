# `make quickstart`: install and run the whole mission, small.  `make test`: install and pass the tests.
PYTHON ?= python3.11
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
STAMP := $(VENV)/.hfpipe-installed

.PHONY: install quickstart test-fast test test-all test-oldest faults test-faults lint docs site clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/hfpipe run recipes/quickstart.yaml

# A worker more than there are cores, as many tests wait for a server; one thread a worker; a file is one worker's.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
FAST := -m "not slow and not gpu"

test-fast: install  # the tests of less than about two seconds each
	$(PYTEST) $(FAST) --durations 5

test: install  # all but the longest
	$(PYTEST) -m "not long"

test-all: install
	$(PYTEST)

docs: install  # the references that are made from the code
	$(BIN)/python docs/make_references.py

# The lowest versions that pyproject.toml allows, torch aside, in a venv of their own. uv solves them; pip takes hours.
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints.txt torch uv
	grep '^torch==' constraints.txt > $(OLDEST)/torch.txt
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --constraint $(OLDEST)/torch.txt --editable '.[dev]'
	$(subst $(BIN),$(OLDEST)/bin,$(PYTEST)) $(FAST)

# The pages lie in the site as they do here, so that links between them hold. A page or anchor that is not there fails.
site: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	rm -rf build/docs && mkdir -p build/docs/docs build/docs/recipes
	cp README.md README.zh-CN.md CONTRIBUTING.md AGENTS.md LICENSE accelerate_config.yaml build/docs
	cp docs/*.md docs/notebook.ipynb build/docs/docs
	cp -r recipes/. build/docs/recipes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

faults: install
	$(BIN)/python tests/faults.py  # 12,000 spoilt inputs, about half an hour of one core

test-faults: install  # a tenth of them
	$(PYTEST) tests/test_faults.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
