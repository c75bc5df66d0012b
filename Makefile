# Each target is the only command to type: it makes and reuses $(VENV) by itself.
#   make TORCH_CUDA_ARCH_LIST="9.0a" bench-gpu                   CUDA kernels for this GPU alone
#   make test ARGS="-k linear"                                   arguments for the command behind it
#   make PYTHON=python3.12 VENV=.venv312 TORCH=torch==2.13.0 test   another Python, another torch

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch>=2.11
ARGS   ?=
# What the tests execute; every GPU from 8.0 on runs one of the two (the driver compiles the PTX).
export TORCH_CUDA_ARCH_LIST ?= 8.0 9.0a

# A process per core, of up to 3 GB (tests/conftest.py says what may run beside what).
# ARGS="-n 0": in one process.
PARALLEL := -n logical --maxprocesses 8
# Threads that wait for each other by spinning take the core from the process beside them.
test test-kernels: export OMP_WAIT_POLICY ?= passive

PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
# Another PYTHON or TORCH is another environment: its name is part of the stamp's.
BASE   := $(STAMPS)/base-$(shell printf '%s' '$(PYTHON) $(TORCH)' | cksum | cut -d' ' -f1)

# Folders too: their time tells of files added and removed.
CSRC   := $(sort $(shell find csrc 2>/dev/null))
CXX_SOURCES := $(filter %.h %.hpp %.cpp %.cuh %.cu,$(CSRC))
TYPED  := $(wildcard loraxs_kernels tests bench examples tools setup.py setup_native.py setup_cuda.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo ablation test test-kernels lint format bench bench-gpu bench-multi bench-svd bench-train ci clean distclean

help: ## this list
	@awk -F': .*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMPS)/extra-demo ## fine-tune MiniLM on movie reviews with LoRA-XS, LoRA and VeRA
	$(PY) -m loraxs_kernels demo $(ARGS)

ablation: $(STAMPS)/extra-demo ## where the bases come from: top, middle, bottom, random; 25 minutes
	$(PY) -m examples.ablation $(ARGS)

test: $(STAMPS)/extra-test $(STAMPS)/weights ## all tests
	$(PY) -m pytest $(PARALLEL) $(ARGS)

test-kernels: $(STAMPS)/extra-test ## every GPU kernel that is considered, compiled and executed without a GPU
	$(PY) -m pytest $(PARALLEL) -m exhaustive tests/test_triton_*.py tests/test_cuda_*.py $(ARGS)

lint: $(STAMPS)/extra-lint ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(TYPED)
	$(if $(CXX_SOURCES),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES))

format: $(STAMPS)/extra-lint ## rewrite the sources as lint wants them
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(if $(CXX_SOURCES),$(VENV)/bin/clang-format -i $(CXX_SOURCES))

bench: $(STAMPS)/extra-bench ## the layer beside the bare linear and its peers
	$(PY) -m bench.bench_linear $(ARGS)

bench-gpu: $(STAMPS)/extra-bench ## the layer on a GPU; without one, a modelled roofline
	$(PY) -m bench.bench_linear --device cuda $(ARGS)

bench-multi: $(STAMPS)/extra-bench ## an adapter per row: rows, adapters, popularity
	$(PY) -m bench.bench_multi $(ARGS)

bench-svd: $(STAMPS)/extra-bench $(STAMPS)/weights ## the initializer beside other SVDs
	$(PY) -m bench.bench_svd $(ARGS)

bench-train: $(STAMPS)/extra-bench $(STAMPS)/weights ## whole training steps of real models, and generation
	$(PY) -m bench.bench_train $(ARGS)

ci: ## what a clean machine runs: lint, test, and a smoke run beside another torch
	bash .ci/run

clean: ## delete builds and caches
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f loraxs_kernels/*.so loraxs_kernels/_native.json $(STAMPS)/extra-*
	find loraxs_kernels tests bench examples tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and delete $(VENV)
	$(call delete_venv)

# Deletes $(VENV) only if this Makefile made it.
define delete_venv
@if [ -d '$(STAMPS)' ]; then echo "==> deleting $(VENV)"; rm -rf '$(VENV)'; fi
endef

$(BASE):
	$(call delete_venv)
	@echo '==> making $(VENV) with $(PYTHON) and $(TORCH) (once; PyTorch is large, this takes minutes)'
	$(PYTHON) -m venv '$(VENV)'
	$(PIP) install 'setuptools>=77' wheel '$(TORCH)'
	$(PIP) install --no-deps nvidia-cutlass # headers for the CUDA kernels; it would bring much else
	@mkdir -p $(STAMPS)
	@touch $@

# One stamp for each extra, so that a command installs what it declares and nothing else. Unchanged
# C++ is not compiled again. CUDA kernels take minutes to build, and demo and lint need none: these
# two build none where none are yet.
$(STAMPS)/extra-%: $(BASE) pyproject.toml setup.py setup_native.py setup_cuda.py $(CSRC)
	@echo '==> installing loraxs_kernels[$*] into $(VENV)'
	$(if $(filter demo lint,$*),$(if $(wildcard loraxs_kernels/_cuda.*so),,LORAXS_BUILD_CUDA=0)) \
	$(PIP) install --no-build-isolation -e '.[$*]'
	@cat loraxs_kernels/_native.json 2>/dev/null || true
	@touch $@

$(STAMPS)/weights: $(BASE) tools/weights.txt
	$(PIP) install --no-deps -r tools/weights.txt
	@touch $@
