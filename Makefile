# `make demo` and `make test` need Debian, Python 3.11 and pip; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.croupier-stamp
CONFIG ?= configs/quickstart.yaml
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Every process that a test starts would compile what it imports, and pytest every test, each time anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help demo test slow sglang browser chaos gpu lint format bench doctor clean .venv

help:  ## this list
	@grep -hE '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z.]+):.*##/  make \1\t/'

# A venv that already exists is kept; pip only adds what is missing from it. Where Debian has no python3-venv, the
# venv is made without pip and the system's pip puts one in.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) >/dev/null || $(PYTHON) -m venv --clear --without-pip $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(VENV) has a Python before 3.11; remove it or pass PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(BIN)/python install -q pip
	@echo "installing pinned packages into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 -e '.[test]'
	@touch $@

.venv: $(STAMP)  ## the virtual environment with pinned dependencies

demo: $(STAMP)  ## train the quick start: make demo ARGS="run.steps=50 run.name=short"
	@$(BIN)/python -m tools.launch $(CONFIG) $(ARGS)

lint: $(STAMP)  ## formatting, lint, types and the import rule
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# Three workers on two cores: tests that wait for processes and sockets leave a third of them free. In the order of
# the files, the longest tests (integration) first: xdist would put files of few tests last.
test: lint  ## what CI runs: lint, then the fast tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

slow: $(STAMP)  ## tests that take longer than ten seconds each and kill nobody
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not chaos and not gpu and not sglang" $(ARGS)

sglang: $(STAMP)  ## tests against the real SGLang server on this machine's CPU; installs it into .sglang (2.8 GB) once
	@$(BIN)/python -m tools.sglang_cpu install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m sglang $(ARGS)

browser: $(STAMP)  ## the page of tools.watch in a headless Chromium (apt-get install -y chromium)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser $(ARGS)

chaos: $(STAMP)  ## processes killed and stopped at random, networks cut (ten minutes; networks need root)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m chaos $(ARGS)

gpu: $(STAMP)  ## the checks that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu tests/gpu $(ARGS)

.gpu: $(STAMP)  ## what a lent machine (Python 3.12, torch, transformers) lacks; carry this folder; CONTRIBUTING.md says what to run there
	@$(BIN)/pip install -q --target .gpu --python-version 3.12 --only-binary=:all: --no-deps -c constraints.txt \
	    omegaconf PyYAML pyzmq msgpack pytest pytest-timeout iniconfig pluggy packaging pygments rich markdown-it-py mdurl

format: $(STAMP)  ## let ruff rewrite the files
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## one figure: make bench NAME=loop
	@$(BIN)/python -m tools.bench $(NAME) $(ARGS)

doctor: $(STAMP)  ## what this machine lacks
	@$(BIN)/python -m tools.doctor $(CONFIG)

clean:  ## caches and build outputs; keeps .venv, runs and models
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
