# SuperCL: `make` shows the targets. Variables are given as `make preprocess INPUT=Task02_Heart CACHE=heart.zarr`.
.DEFAULT_GOAL := help
.ONESHELL:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Stops with an example where a variable is missing: $(call need,NAME,example).
need = $(if $($(1)),,$(error $(1) is missing; for example: make $@ $(2)))

# Several GPUs: one process each.
LAUNCH := $(if $(filter-out 0 1,$(GPUS)),$(BIN)/torchrun --standalone --nproc-per-node $(GPUS) --no-python )$(BIN)/supercl
EXTRA := $(if $(CONFIG),--config $(CONFIG)) $(if $(PRESET),--preset $(PRESET))

.PHONY: help setup demo test test-slow coverage lint schema preprocess pretrain finetune evaluate study-hippocampus study-acdc site wheel bench bench-training stress fuzz

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## install everything into .venv (done by the other targets as needed)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "SuperCL needs Python 3.11 or newer; name one with PYTHON=")'
	@echo 'Installing into $(VENV): about 2.5 GB, once.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## the whole road in minutes, on synthetic anatomy or DATA= (a folder in MSD layout)
	@PATH="$(CURDIR)/$(BIN):$$PATH" benchmarks/demo.sh "$(or $(OUT),demo)" $(DATA)

test: $(READY)  ## the test suite but for the slow ones
	$(BIN)/python -m pytest -m 'not slow' -q

test-slow: $(READY)  ## the slow tests
	$(BIN)/python -m pytest -m slow -q

coverage: $(READY)  ## line coverage of each package but for compiled kernels, over the fast tests
	$(BIN)/python -m pytest -m 'not slow' -q --cov --cov-report=
	for package in supercl_core preprocess train; do
	  printf '%-14s' $$package
	  $(BIN)/python -m coverage report --include="$$package/*" --omit="preprocess/kernels/*" --format=total
	done

lint: $(READY)  ## style, types, and whether cache_schema.md is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for platform in linux darwin win32; do $(BIN)/mypy --platform $$platform; done
	$(BIN)/python -m supercl_core.cache.schema_page | diff cache_schema.md - || { echo 'cache_schema.md is stale: make schema'; exit 1; }

wheel: $(READY)  ## build the wheel, install it in empty environments by each extra alone, and use it (some four minutes)
	PYTHON=$(BIN)/python tests/wheel.sh

site: $(READY)  ## the documentation as a site, in site/
	$(BIN)/python -m mkdocs build --strict

schema: $(READY)  ## write cache_schema.md from supercl_core/cache (schema.py, schema_page.py, recipes.py)
	$(BIN)/python -m supercl_core.cache.schema_page > cache_schema.md

stress: $(READY)  ## [ROUNDS=200] [SEED=] kills, flipped bytes and corrupt inputs, against an uninterrupted run (half an hour)
	ROUNDS=$(or $(ROUNDS),200) SEED=$(or $(SEED),0) $(BIN)/python tests/stress.py

fuzz: $(READY)  ## [LIMIT_S=600] [PARSERS=] coverage-guided fuzzing of every parser, so many seconds each
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py $(PARSERS) --seconds $(or $(LIMIT_S),600) --jobs 2

preprocess: $(READY)  ## INPUT= CACHE= [WORKERS=] [SCHEDULER=] [SLURM=] [SLIC=] [CONFIG=] [DRY_RUN=1]
	@$(call need,INPUT,INPUT=Task02_Heart CACHE=heart.zarr)$(call need,CACHE,INPUT=Task02_Heart CACHE=heart.zarr)
	$(BIN)/supercl preprocess $(INPUT) $(CACHE) $(if $(WORKERS),--workers $(WORKERS)) \
	  $(if $(SCHEDULER),--scheduler $(SCHEDULER)) $(if $(SLURM),--slurm $(SLURM)) $(if $(SLIC),--slic $(SLIC)) \
	  $(if $(CONFIG),--config $(CONFIG)) $(if $(DRY_RUN),--dry-run)

pretrain: $(READY)  ## CACHE= RUN= [SPLIT=] [GPUS=] [CONFIG=] [PRESET=]
	@$(call need,CACHE,CACHE=heart.zarr RUN=runs/pretrain)$(call need,RUN,CACHE=heart.zarr RUN=runs/pretrain)
	$(LAUNCH) pretrain $(CACHE) $(RUN) $(if $(SPLIT),--split $(SPLIT)) $(EXTRA)

finetune: $(READY)  ## CACHE= RUN= INIT= SPLIT= LABELLED= [CONFIG=] [PRESET=]
	@$(foreach name,CACHE RUN INIT SPLIT LABELLED,$(call need,$(name),CACHE=heart.zarr RUN=runs/pretrained INIT=runs/pretrain SPLIT=split.json LABELLED=2))
	$(BIN)/supercl finetune $(CACHE) $(RUN) --init $(INIT) --split $(SPLIT) --labelled $(LABELLED) $(EXTRA)

evaluate: $(READY)  ## RUN= CACHE=
	@$(call need,RUN,RUN=runs/pretrained CACHE=heart.zarr)$(call need,CACHE,RUN=runs/pretrained CACHE=heart.zarr)
	$(BIN)/supercl evaluate $(RUN) $(CACHE)

study-hippocampus: $(READY)  ## DATA= SPLIT= OUT= [JOBS=1] [FACTOR=1] [SET="KEY=VALUE ..."] the study on MSD Hippocampus (goes on after a stop)
study-acdc: FACTOR ?= 3
study-acdc: $(READY)  ## the same on ACDC, at 1/FACTOR of its resolution (3)
study-hippocampus study-acdc:
	@$(foreach name,DATA SPLIT OUT,$(call need,$(name),DATA=Task04_Hippocampus SPLIT=paper_splits.json OUT=studies/out))
	name=$(@:study-%=%) factor=$(or $(FACTOR),1) data="$(DATA)"
	out="$(OUT)/$$name"
	if [ "$$factor" != 1 ]; then
	  data="$$out-data-$$factor"
	  [ -e "$$data/dataset.json" ] || $(BIN)/python -m benchmarks.shrink "$(DATA)" "$$data" --factor "$$factor"
	fi
	cache="$$out-$$factor.zarr"
	$(BIN)/supercl preprocess "$$data" "$$cache" $(if $(filter study-acdc,$@),--set spacing=unknown)
	status=0
	$(BIN)/supercl study studies/$$name.toml "$$out" --jobs $(or $(JOBS),1) --set cache="$$cache" \
	  --set split="$(SPLIT)" $(foreach one,$(SET),--set '$(one)') || status=$$?
	[ $$status = 0 ] || [ $$status = 3 ] || exit $$status
	$(BIN)/supercl report "$$out" -o "$$out.html"
	exit $$status

bench: $(READY)  ## DATA="DIR DIR" [QUICK=1] benchmarks of the cache; those of preprocessing go to docs/benchmarks.md
	@$(call need,DATA,DATA="ACDC Task04_Hippocampus")
	$(BIN)/python -m benchmarks.all_preprocessing $(foreach folder,$(DATA),--data $(folder)) $(if $(QUICK),--quick)
	for folder in $(DATA); do $(BIN)/python -m benchmarks.verify --data $$folder $(if $(QUICK),--quick); done
	$(BIN)/python -m benchmarks.weak_labels --data $(lastword $(DATA)) $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.forms $(foreach folder,$(DATA),--data $(folder)) $(if $(QUICK),--quick)

bench-training: $(READY)  ## [QUICK=1] reading, input, step and losses against the published way, to docs/benchmarks-training.md
	$(BIN)/python -m benchmarks.all_training $(if $(QUICK),--quick)
