# Every target is the command line's own commands; nothing here hides a step. `make help` lists them.
SEED ?= 0
NAME ?= quickstart
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TINY := --config configs/quickstart_smoke.yaml

.PHONY: help setup quickstart quickstart-smoke test check clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

# constraints.txt pins the tested set; without it a bare `torch` may bring gigabytes of CUDA libraries.
$(STAMP): setup.py constraints.txt
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,dev]"
	touch $(STAMP)

setup: $(STAMP) ## create .venv and install (once)

quickstart: $(STAMP) ## cold start, then SD-Search: a model learns to search (SEED=0 NAME=quickstart)
	$(PYTHON) -m sdsearch_lightning supervise --config configs/quickstart_cold_start.yaml --seed_everything $(SEED) \
	  --run.name $(NAME)_cold_start
	$(PYTHON) -m sdsearch_lightning fit --config configs/quickstart.yaml --seed_everything $(SEED) \
	  --run.name $(NAME) --model.model_name_or_path runs/$(NAME)_cold_start/model
