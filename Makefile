# Everything runs in .venv, which `make setup` makes; the site and releases are made in .venv-docs and .venv-release.
# Variables:
#   DEVICE=cpu|gpu   which vLLM (default: gpu if nvidia-smi finds a GPU)
#   VLLM=0.33        which release of vLLM (default: the newest supported one that the package index has for DEVICE)
#   PYTHON=python3   the interpreter to make .venv with, 3.11 to 3.14
#   PIP_ARGS=...     more arguments for pip install, such as another index
#   LOCK=1           install the versions in .ci/constraints, where they are for this machine (default: the newest)
#   JOBS=2           processes that `make test` shares the test files out to (default on a GPU: none)
#   ARGS=...         more arguments for the demo, pytest or vllm serve
#   MODEL=...        what `make serve` serves (default: examples/fox-tiny)
PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)
MODEL ?= examples/fox-tiny
JOBS ?= $(if $(filter gpu,$(DEVICE)),0,2)
VENV := .venv
BIN := $(VENV)/bin
LOCKED := $(if $(filter-out 0,$(LOCK)),-locked)
STAMP := $(VENV)/.setup-$(DEVICE)$(VLLM)$(LOCKED)
PINS := .ci/constraints
TOOLS := .venv-release

.DEFAULT_GOAL := help
.PHONY: help setup demo test serve lint docs lock audit release clean FORCE

help:
	@echo 'make setup    install vLLM (here: $(DEVICE)) and vllm-fox into .venv'
	@echo 'make demo     serve three small models, send them long prompts, show what was given back'
	@echo 'make test     run the tests'
	@echo 'make serve    serve MODEL (default: examples/fox-tiny) on port 8000'
	@echo 'make lint     ruff, mypy, and which part may import which'
	@echo 'make docs     build the documentation site into site/'
	@echo 'make lock     write the versions that are installed here into .ci/constraints'
	@echo 'make audit    look for known vulnerabilities in the versions of .ci/constraints'
	@echo 'make release  build a release into dist/, and check it in clean environments'
	@echo 'make clean    remove .venv, caches and build products'

setup: $(STAMP)

# An environment that was made for another device or release, or in another folder, does not count.
ifneq ($(shell cat $(VENV)/.made-for 2>/dev/null),$(DEVICE) $(VLLM) $(CURDIR))
$(STAMP): FORCE
endif
FORCE:

$(STAMP): pyproject.toml .ci/setup.sh .ci/install.sh $(if $(LOCKED),$(wildcard $(PINS)/$(DEVICE).txt))
	@PYTHON='$(PYTHON)' PIP_ARGS='$(PIP_ARGS)' VLLM='$(VLLM)' LOCK='$(LOCK)' .ci/setup.sh '$(DEVICE)' '$(VENV)'
	@touch $@

demo: setup
	@$(BIN)/python examples/demo.py $(ARGS)

test: setup
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

serve: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/serve.sh '$(MODEL)' $(ARGS)

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache

# In an environment of its own: the site is made from sources and docstrings, without vLLM. With --quiet MkDocs would
# count no warnings, so --strict would let broken links pass.
docs: .venv-docs/.setup$(LOCKED)
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo 'site/index.html is ready'

.venv-%/.setup$(LOCKED): pyproject.toml .ci/install.sh $(if $(LOCKED),$(PINS)/%.txt)
	@$(PYTHON) -m venv '.venv-$*'
	@PIP_ARGS='$(PIP_ARGS)' LOCK='$(LOCK)' .ci/install.sh '.venv-$*' '$(PINS)/$*.txt' -e '.[$*]'
	@touch $@

lock: setup .venv-docs/.setup$(LOCKED) $(TOOLS)/.setup$(LOCKED)
	@mkdir -p $(PINS)
	@$(BIN)/python .ci/lock.py '$(PINS)/$(DEVICE).txt' '$(DEVICE)' dev
	@.venv-docs/bin/python .ci/lock.py $(PINS)/docs.txt docs
	@$(TOOLS)/bin/python .ci/lock.py $(PINS)/release.txt release

# File by file, because pip-audit takes a package in one version only. With --strict a package that the database could
# not be asked about is an error, and not a line below "No known vulnerabilities".
audit: $(TOOLS)/.setup$(LOCKED)
	@found=0; for pins in $(PINS)/*.txt; do \
	    echo "audit: $$pins"; \
	    $(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --requirement "$$pins" $(ARGS) || found=1; \
	done; exit $$found

release: setup $(TOOLS)/.setup$(LOCKED)
	@PIP_ARGS='$(PIP_ARGS)' $(TOOLS)/bin/python .ci/release.py dist $(BIN)/python

clean:
	rm -rf $(VENV) .venv-docs $(TOOLS) site build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
