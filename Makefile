# Everything runs from a bare Python 3.11 to 3.13 and make: the first target that needs the
# environment builds it in .venv, later ones find it there.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# Offline, no telemetry, one torch thread, and a KV pool that fits a small machine.
OFFLINE := HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1}
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# --no-compile: Python compiles what is imported when it is imported; the rest never needs it.
PIP_INSTALL := $(PIP) install --no-compile --no-input

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.installed ## build .venv with vLLM (CPU), transformers and kvpolicy

demo: $(VENV)/.installed ## generate text with vLLM under several policies; print what it cost
	@$(OFFLINE) $(BIN)/kvpolicy demo

test: lint ## lint, check types and run the default test suite
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed ## run the slow tests only
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed ## ruff (lint, format) and pyright, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --warnings

format: $(VENV)/.installed ## let ruff sort imports, mend what it can and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/.installed ## run the benchmarks
	@if [ -d tests/bench ]; then \
		$(OFFLINE) $(BIN)/python -m pytest tests/bench -m bench $(PYTEST_ARGS); \
	else echo "no benchmarks yet: tests/bench does not exist"; fi

clean: ## remove caches and build results; .venv stays
	rm -rf dist build .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment, in three stamped steps --------------------------------------------------

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { \
		echo "kvpolicy needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python" >&2; exit 1; }
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "could not create $(VENV): Debian and Ubuntu ship venv as python3-venv" >&2; exit 1; }

# The list is complete, so nothing is resolved. The second command is for torch builds that need
# libraries of their own, as the CUDA build does: it does nothing for the CPU build.
$(VENV)/.requirements: constraints.txt | $(BIN)/python
	@echo "[2/3] installing $$(grep -c == constraints.txt) pinned packages (about 2.5 GB, a few minutes)"
	@$(PIP_INSTALL) --no-deps -r constraints.txt
	@$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.requirements
	@echo "[3/3] installing kvpolicy (editable)"
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "done: $(BIN)/kvpolicy --help"
