# Two commands: `make train` runs the main job, `make test` lints and tests.
# Both set up a virtual environment in .venv on first use.
PYTHON ?= python3
VENV ?= .venv
# What pip is asked for: a package, and options if you like. On Linux the default index has the
# build for CUDA, a download of some gigabytes; that for CPUs alone has an index of its own.
TORCH ?= torch==2.13.0
RUN = $(VENV)/bin/python
# setuptools warns of folders that have the name of a package, which ours has on purpose.
PIP = PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet

.PHONY: train test lint setup bench clean

train: $(VENV)/.train
	$(RUN) sota-implementations/evor/evor.py $(ARGS)

test: $(VENV)/.dev lint
	$(RUN) -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.dev
	$(RUN) -m pytest benchmarks -o addopts= $(ARGS)

setup: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

$(VENV)/.torch: $(VENV)/bin/python
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.train: $(VENV)/.torch setup.py
	$(PIP) --editable ".[all]"
	touch $@

$(VENV)/.dev: $(VENV)/.train setup.py
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
