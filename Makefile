# `make` lists the targets. Settings go after it: make figures PROFILE=h200

PROFILE ?= laptop
# A Python that gnlib supports, the tested one first
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
# An environment that exists, such as conda's, serves too: VENV=$CONDA_PREFIX
VENV ?= .venv
BIN = $(VENV)/bin
# Further arguments of pip install, e.g. where to find the build of torch for this machine
PIP_ARGS ?=
WORKERS ?= 2

# What the targets run; STUDIES are all but more_baselines, of which notebook 01 shows what is there
STUDY = iteration_complexity
NOTEBOOK = 01_iteration_complexity
STUDIES = iteration_complexity critical_batch_size fixed_budget prox_linear layerwise schedules line_search step_lengths \
	inner_solver stateless variants baseline_settings
SEEDS = 1
GNLIB = $(BIN)/gnlib
PAPERMILL = $(BIN)/papermill --kernel python3 -p profile $(PROFILE)
EXECUTED = data/notebooks/$(PROFILE)
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout=120

# Notebooks run in this environment, whatever kernels, settings and start-up files the user has elsewhere
unexport JUPYTER_PATH
export JUPYTER_PREFER_ENV_PATH = 1
export JUPYTER_CONFIG_DIR = $(abspath $(VENV))/state/jupyter
export JUPYTER_DATA_DIR = $(abspath $(VENV))/state/jupyter-data
export IPYTHONDIR = $(abspath $(VENV))/state/ipython
export MPLCONFIGDIR = $(abspath $(VENV))/state/matplotlib
export PYDEVD_DISABLE_FILE_VALIDATION = 1

.PHONY: help setup reproduce reproduce-all figures notebooks tune test test-gpu bench lint clean-runs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'PROFILE=laptop|h200 picks the size; PYTHON=, VENV=, PIP_ARGS=, WORKERS= are explained in the Makefile.'

INSTALLED = $(VENV)/.gnlib-installed

setup: $(INSTALLED) ## install gnlib and the tested versions into .venv (again when they change)

# The last command builds matplotlib's font cache, so that no notebook is the one to report it
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo 'Python 3.11-3.13 needed: make setup PYTHON=...' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[all]'
	$(BIN)/python -c 'import matplotlib.font_manager'
	@touch $@

reproduce: setup ## train what is missing for the first claim, run its notebook, check the claims
	$(GNLIB) study $(STUDY) --profile $(PROFILE) --seeds $(SEEDS) --fresh
	@mkdir -p $(EXECUTED)
	$(PAPERMILL) -p rerun True -y "seeds: [$(SEEDS)]" notebooks/$(NOTEBOOK).ipynb $(EXECUTED)/$(NOTEBOOK).ipynb; \
	executed=$$?; $(GNLIB) claims --profile $(PROFILE) --seeds $(SEEDS) --study $(STUDY) --fresh && exit $$executed

reproduce-all: setup ## the same for every notebook and every study but more_baselines
	for study in $(STUDIES); do $(GNLIB) study $$study --profile $(PROFILE) --fresh || exit 1; done
	@mkdir -p $(EXECUTED)
	for notebook in notebooks/*.ipynb; do \
		$(PAPERMILL) -p rerun True "$$notebook" "$(EXECUTED)/$${notebook##*/}" || exit 1; done
	$(GNLIB) claims --profile $(PROFILE) --fresh

figures: setup ## draw every figure of PROFILE again from its records, by the notebooks, and print the claims; trains nothing
	@mkdir -p $(EXECUTED)
	@failed=; for notebook in notebooks/*.ipynb; do \
		case "$$notebook" in *10_*) own=laptop;; *12_*) own=h200;; *) own=$(PROFILE);; esac; \
		CI=true $(PAPERMILL) -p profile $$own "$$notebook" "$(EXECUTED)/$${notebook##*/}" || failed="$$failed $${notebook##*/}"; done; \
	$(GNLIB) claims --profile $(PROFILE); \
	test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

notebooks: setup ## execute the notebooks in place, from the records, for the commit
	CI=true $(BIN)/jupyter-execute --inplace --kernel_name=python3 notebooks/*.ipynb
	$(BIN)/nbstripout --keep-output --keep-count --keep-id notebooks/*.ipynb

tune: setup ## tune and run the same studies of PROFILE, all settings side by side (hours; again to go on)
	$(GNLIB) sweep $(STUDIES) --profile $(PROFILE)

test: export CI = true
test: export OMP_NUM_THREADS = 1
test: setup lint ## lint, then tests and notebooks; nothing is trained beyond tiny models
	$(PYTEST) tests notebooks

test-gpu: setup ## the tests that need a CUDA device, and nothing else
	$(BIN)/pytest -m gpu tests

bench: setup ## time of every method's step on this machine, beside a standard one
	$(GNLIB) bench

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean-runs: ## delete what was trained and executed here (data/runs, data/notebooks)
	rm -rf data/runs data/notebooks
