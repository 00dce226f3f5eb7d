# Lorayard. `make` lists the targets. The first run of any of them sets up .venv and compiles llama.cpp, once (tools/setup.py).
#   make PYTHON=/path/to/python3.12 ...     the interpreter to make .venv with
#   make test ARGS="-k ledger"              arguments for pytest, or for `lorayard demo`

.DEFAULT_GOAL := help
.PHONY: help setup setup-demo setup-train demo test faults slow mutants check format pins clean
MAKEFLAGS += --no-print-directory
SHELL := /bin/sh
BIN := .venv/bin
PYTHON :=
ARGS :=

# The first interpreter that runs, is one we support, and can make virtual environments. A pyenv shim may exist and not run.
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info[:2] <= (3, 13))
define find_python
	for p in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[123].*/bin/python); do \
		if "$$p" -c '$(SUITABLE)' >/dev/null 2>&1; then python=$$p; break; fi; \
	done; \
	if [ -z "$${python:-}" ]; then \
		echo 'lorayard: needs CPython 3.11, 3.12 or 3.13 with its venv module (Debian and Ubuntu: apt install python3-venv); found' \
			"$(or $(PYTHON),python3): $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1). Choose one with make PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi
endef

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: ## .venv with everything for development and tests
	@$(find_python); exec "$$python" tools/setup.py dev

setup-demo: ## .venv with what the demo needs
	@$(find_python); exec "$$python" tools/setup.py demo

setup-train: ## .venv with torch and PEFT too, to train adapters and to run the tests marked train
	@$(find_python); exec "$$python" tools/setup.py dev train

demo: setup-demo ## run the demo: a fleet on this machine, real adapters, real jobs
	@exec $(BIN)/lorayard demo $(ARGS)

test: check ## linters, then all tests
	@exec $(BIN)/python -m pytest $(ARGS)

faults: setup ## every fault in full (some 20 minutes, best as root); writes build/faults.json and .md; then the ledger's model, at length
	@LORAYARD_FAULTS_REPORT=build/faults $(BIN)/python -m pytest tests/faults -m faults $(ARGS)
	@LORAYARD_MODEL_EXAMPLES=2000 exec $(BIN)/python -m pytest tests/test_ledger_model.py

slow: setup ## the long forms of tests that also have a short one: 10,000 adapters loaded, memory flat (half a minute)
	@exec $(BIN)/python -m pytest -m slow $(ARGS)

mutants: setup ## break the code on purpose, one place at a time: does a test notice? (over an hour; ARGS=--rest goes on); writes docs/mutants.md
	@exec $(BIN)/python tests/mutants.py --report docs/mutants.md $(ARGS)

check: setup ## linters and types, no tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@out=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$out"; exit 1; }

format: setup ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

pins: setup ## rewrite constraints.txt after a change of the dependencies (ARGS=--upgrade: newest versions)
	@$(BIN)/python tools/pins.py $(ARGS)

clean: ## remove .venv and caches (not .lorayard, where jobs are, nor the compiled llama.cpp in ~/.cache/lorayard)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
