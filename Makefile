# `make demo` and `make test` are all that a fresh machine needs: each makes .venv, installs, builds
# and runs. A torch that the python in use has is used and never replaced; where there is none, TORCH
# is installed. To choose another: make TORCH='torch==2.12.1', or PYTHON=python3.12 (after make clean).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
BUILT := $(VENV)/built
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu policies/eviction/*.h)
CLANG_FORMAT := $(VENV_PYTHON) -c 'import clang_format as f; f.clang_format()'

# Small matmuls on several threads are many times slower when a core is busy.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint format build clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: build  ## run the trained model with a quarter of its experts in memory
	$(VENV_PYTHON) -m tiered_mem run benchmarks/models/tiny-moe --hbm 25% --dram 25% --check \
	  --prompt 'And it came to pass, that the king' --max-new-tokens 120 --temperature 0.7 --seed 2

test: lint  ## check the style and types, then run the tests (two at a time)
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile

lint: build  ## ruff, mypy and clang-format
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy tiered_mem policies
	@$(CLANG_FORMAT) --dry-run --Werror $(CPP) $(wildcard tests/cpp/*)

format: build  ## bring all sources into shape
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .
	@$(CLANG_FORMAT) -i $(CPP) $(wildcard tests/cpp/*)

build: $(BUILT)  ## make the venv, install and compile

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info tiered_mem/_core*.so tiered_mem/kernels.fatbin

$(VENV)/ready: .ci/make_venv.py
	@$(PYTHON) .ci/make_venv.py $(VENV) '$(TORCH)'
	@touch $@

# The constraint keeps pip from replacing the torch that make_venv.py found or installed.
$(BUILT): $(VENV)/ready pyproject.toml setup.py $(CPP)
	@echo installing into $(VENV) and compiling: a minute or two
	@$(VENV_PYTHON) -m pip install -q 'setuptools>=77' 'pybind11>=2.13' wheel
	@$(VENV_PYTHON) -m pip install -q --no-build-isolation -c $(VENV)/constraints.txt -e '.[test]'
	@touch $@
