# Everything runs from a bare Python 3.11 to 3.13 and make: the first target that needs the
# environment builds it in .venv, later ones find it there.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .venv-bench
RAY_VENV := .venv-ray
BROWSER_LIBRARY := .venv-browser
XFORMERS_VENV := .venv-xformers
MINIMUM_VENV := .venv-minimum
DOCS_VENV := .venv-docs
SITE := docs/_build
PYTEST_ARGS ?=

# Offline, no telemetry, one torch thread, and a KV pool that fits a small machine.
OFFLINE := HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1}
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# --no-compile: Python compiles what is imported when it is imported; the rest never needs it.
PIP_OPTIONS := --disable-pip-version-check -qq install --no-compile --no-input
PIP_INSTALL := $(BIN)/python -m pip $(PIP_OPTIONS)
BENCH_PIP_INSTALL := $(BENCH_VENV)/bin/python -m pip $(PIP_OPTIONS)

# A network of its own, which ends with all processes in it; root is needed for neither.
OWN_NETWORK := unshare --map-root-user --net --pid --fork --kill-child --mount-proc

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-release test-minimum test-prometheus test-ray \
	test-browser test-xformers soak lint format docs bench bench-env ray-env xformers-env clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.installed ## build .venv with vLLM (CPU), transformers and kvpolicy

demo: $(VENV)/.installed ## generate text with vLLM under several policies; print what it cost
	@$(OFFLINE) $(BIN)/kvpolicy demo

test: lint ## lint, check types and run the default test suite
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed ## run the slow tests only
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Online, as a stranger's installation is: pip resolves what the wheel asks for.
test-release: $(VENV)/.installed ## install the wheel from the package index and use it
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -m release tests/test_clean_environment.py $(PYTEST_ARGS)

# Old releases warn about each other, which says nothing about us.
test-minimum: $(MINIMUM_VENV)/.installed ## test on the oldest releases promised; PYTHON= chooses Python
	@$(OFFLINE) $(ONE_THREAD) $(MINIMUM_VENV)/bin/python -m pytest -o filterwarnings=default \
		tests/core tests/trace tests/sim $(wildcard tests/integrations/test_hf_*.py) $(PYTEST_ARGS)

test-prometheus: $(VENV)/.installed ## let a real Prometheus scrape a server; needs its program
	@command -v "$${PROMETHEUS:-prometheus}" >/dev/null || { \
		echo "no prometheus on PATH: install it (Debian, Ubuntu: apt-get install prometheus)," \
			"or set PROMETHEUS=/path/to/prometheus" >&2; exit 1; }
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -m prometheus tests/cli $(PYTEST_ARGS)

# Ray listens on every interface, whatever it is told: nobody else is on this one.
test-ray: ray-env ## sweep on a Ray cluster of this machine, in a network of its own
	@$(OWN_NETWORK) true || { echo "cannot make a network namespace: Linux and util-linux's unshare," \
		"with user namespaces or as root, are needed" >&2; exit 1; }
	@$(OFFLINE) $(ONE_THREAD) $(OWN_NETWORK) $(RAY_VENV)/bin/python -m pytest -m ray tests/cli $(PYTEST_ARGS)

test-browser: $(BROWSER_LIBRARY)/.installed ## open pages in a real Chromium; needs its program
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || { \
		echo "no chromium on PATH: install it (Debian: apt-get install chromium)," \
			"or set CHROMIUM=/path/to/chromium" >&2; exit 1; }
	@$(OFFLINE) $(ONE_THREAD) PYTHONPATH=$(BROWSER_LIBRARY) $(BIN)/python -m pytest -m browser tests/browser $(PYTEST_ARGS)

test-xformers: xformers-env ## attend to retained slots with xformers; kernels where there is CUDA
	@$(OFFLINE) $(ONE_THREAD) $(XFORMERS_VENV)/bin/python -m pytest -m xformers tests/integrations \
		$(PYTEST_ARGS)

# SOAK_MINUTES=2 shortens it, SOAK_SEED draws other requests, SOAK_JSON says where its report goes.
soak: $(VENV)/.installed ## keep a server busy for 30 minutes and check every answer
	@$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -s --show-capture=no -m soak tests/soak $(PYTEST_ARGS)

lint: $(VENV)/.installed ## ruff (lint, format) and pyright, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --warnings

format: $(VENV)/.installed ## let ruff sort imports, mend what it can and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# From the root, so that links between the pages and files at the root mean the same as in a clone.
docs: $(DOCS_VENV)/.installed ## build the documentation site; a warning is an error
	@$(OFFLINE) $(ONE_THREAD) $(DOCS_VENV)/bin/python -m sphinx --builder html --conf-dir docs \
		--fail-on-warning --keep-going --quiet \
		--doctree-dir $(SITE)/doctrees . $(SITE)/html
	@echo "open $(SITE)/html/index.html"

bench: $(VENV)/.installed ## run the benchmarks
	@$(MAKE) --no-print-directory bench-env || echo "without kvpress, whose benchmark is skipped"
	@$(OFFLINE) $(BIN)/python -m pytest tests/bench -m bench $(PYTEST_ARGS)

bench-env: $(BENCH_VENV)/.installed ## build .venv-bench: kvpress, for one of the benchmarks
	@:

ray-env: $(RAY_VENV)/.installed ## build .venv-ray: Ray above .venv, for sweeps on a cluster
	@:

xformers-env: $(XFORMERS_VENV)/.installed ## build .venv-xformers: xformers above .venv
	@:

clean: ## remove caches and build results; the environments stay
	rm -rf dist build $(SITE) .pytest_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

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

# What only that target needs lies beside the environment, not in it.
$(BROWSER_LIBRARY)/.installed: tests/browser/requirements.txt | $(VENV)/.installed
	@echo "filling $(BROWSER_LIBRARY): playwright, which drives Chromium, and axe (about 170 MB)"
	@rm -rf $(BROWSER_LIBRARY)
	@$(PIP_INSTALL) --no-deps --target $(BROWSER_LIBRARY) -r $<
	@touch $@

# kvpress cannot live in .venv: it asks for an older transformers.
$(BENCH_VENV)/.installed: tests/bench/requirements-kvpress.txt
	@[ -n "$(PYTHON)" ] || { \
		echo "kvpress needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python" >&2; exit 1; }
	@echo "building $(BENCH_VENV): kvpress and what it imports (about 1.2 GB, a few minutes)"
	@[ -x $(BENCH_VENV)/bin/python ] || $(PYTHON) -m venv $(BENCH_VENV) || { \
		rm -rf $(BENCH_VENV); exit 1; }
	@$(BENCH_PIP_INSTALL) --no-deps -r $<
	@$(BENCH_PIP_INSTALL) "$$(grep '^torch==' $<)"
	@touch $@

$(MINIMUM_VENV)/.installed: tests/requirements-minimum.txt pyproject.toml
	@[ -n "$(PYTHON)" ] || { \
		echo "kvpolicy needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python" >&2; exit 1; }
	@echo "building $(MINIMUM_VENV) with $$($(PYTHON) --version): the oldest releases promised"
	@rm -rf $(MINIMUM_VENV)
	@$(PYTHON) -m venv $(MINIMUM_VENV) || { rm -rf $(MINIMUM_VENV); exit 1; }
	@$(MINIMUM_VENV)/bin/python -m pip $(PIP_OPTIONS) -r $< -e ".[hf,sim,report,testing]"
	@touch $@

# --- environments above .venv: its packages, and one more -------------------------------------

# Not in .venv itself: vLLM and transformers use Ray and xformers unasked where they find them.
$(RAY_VENV)/.installed: tests/requirements-ray.txt
$(XFORMERS_VENV)/.installed: tests/requirements-xformers.txt
$(DOCS_VENV)/.installed: docs/requirements.txt
$(RAY_VENV)/.installed $(XFORMERS_VENV)/.installed $(DOCS_VENV)/.installed: $(VENV)/.installed
	@above=$(@D) && list=$(filter %.txt,$^) && \
		echo "building $$above: $$(grep -m 1 == $$list) above $(VENV)" && \
		{ [ -x $$above/bin/python ] || $(BIN)/python -m venv $$above || { rm -rf $$above; exit 1; }; } && \
		below=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		$$above/bin/python -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), \
			"below.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' $$below && \
		$$above/bin/python -m pip $(PIP_OPTIONS) --no-deps -r $$list
	@touch $@
