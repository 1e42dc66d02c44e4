# Development tasks. Needs python3 3.11 to 3.13 with venv and headers, a C++20 compiler (g++ >= 11) and make; nothing else.
#
#   PYTHON         interpreter that creates the environment    (python3)
#   VENV           where the environment is                    (.venv)
#   TORCH_VERSION  torch to install, for packaging and tests   (2.13.0)
#   EXTRAS         optional dependencies of moecalc to install (dev,lammps)
#   PYTEST_ARGS    more arguments for pytest, for example -k archive
#   WORKERS        test files that run side by side            (one per processor, at most 4; 0: one after the other)
#   MOECALC_CUDA   1: CUDA kernels in this environment as well (0)
#
# With nvcc on the PATH, `make wheel` compiles the CUDA kernels into the wheel, and `make test` tests them, and training with DeePMD-kit, in a
# second environment with a CUDA build of torch. What needs no torch is compiled once for all of them (build/native-*).
#
#   CUDA_VENV           where that environment is              (.venv-cuda, several GB)
#   CUDA_TORCH_VERSION  torch to install there                 (2.11.0)
#   CUDA_ARCHITECTURES  GPUs to compile for                    (8.0;9.0+PTX)

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
EXTRAS ?= dev,lammps
PYTEST_ARGS ?=
WORKERS ?= auto
CUDA_VENV ?= .venv-cuda
CUDA_TORCH_VERSION ?= 2.11.0
CUDA_ARCHITECTURES ?= 8.0;9.0+PTX
MOECALC_CUDA ?= 0
# Not for users, whose compilers may warn of more; the same in all environments, which share what is compiled.
export MOECALC_WERROR ?= $(if $(CI),1,0)

BIN := $(VENV)/bin
# A fresh machine compiles what its tests import, not all that is installed.
NO_COMPILE := $(if $(CI),--no-compile)
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_STAMP := $(VENV)/.torch-$(TORCH_VERSION)
comma := ,
DEV_STAMP := $(VENV)/.moecalc-$(subst $(comma),-,$(EXTRAS))
NATIVE_SOURCES := setup.py pyproject.toml moecalc/_install.py $(shell find cpp lammps_plugin -type f -not -path '*/distribution/*' 2>/dev/null)
CXX_FILES = $(shell find cpp lammps_plugin -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl' 2>/dev/null)
PYTHON_SOURCES := $(shell find moecalc -type f -not -name '*.so' -not -name '*.pyc' -not -name _build_info.py)
NVCC := $(shell command -v nvcc)
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_PIP := $(CUDA_BIN)/python -m pip --disable-pip-version-check
CUDA_TORCH_STAMP := $(CUDA_VENV)/.torch-$(CUDA_TORCH_VERSION)
CUDA_STAMP := $(CUDA_VENV)/.moecalc
# Of the CUDA toolkit, or of the triton that comes with torch.
CUOBJDUMP = $(firstword $(shell command -v cuobjdump) $(wildcard $(CUDA_VENV)/lib/python3*/site-packages/triton/backends/nvidia/bin/cuobjdump))
# What is installed there, not the working tree.
CUDA_RUN = PYTHONSAFEPATH=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(CUDA_BIN)/python
# A file's tests share what they prepare, so they stay together.
PYTEST = -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile
# A torch that was exchanged by hand calls for a new build as well.
INSTALLED_TORCH := $(wildcard $(VENV)/lib/python3*/site-packages/torch/version.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help dev test test-main test-sanitized test-cuda-checks wheel test-wheel test-cuda cuda-env lint lint-style lint-types format
.PHONY: demo docs screenshots clean distclean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

dev: $(DEV_STAMP)  ## Set up the environment and build (only what changed)

# In this order, also with -j; but what is installed for the last two comes while style and types are checked, which takes one processor.
test:  ## Check style and types, run all tests, also under sanitizers, of the wheel, the CUDA kernels and training with DeePMD-kit
	$(MAKE) -j3 lint-style lint-types $(if $(NVCC),$(CUDA_TORCH_STAMP))
	$(MAKE) test-main LINTED=1
	$(MAKE) test-sanitized
	$(MAKE) test-cuda-checks
	$(MAKE) test-wheel
	$(MAKE) test-cuda
	$(if $(NVCC),$(MAKE) test-deepmd,@echo "no second environment: training with DeePMD-kit is not tested (make test-deepmd)")

# One thread: the structures of the tests are small, and threads that wait for each other are slower than none.
test-main: $(if $(LINTED),$(DEV_STAMP),lint)  ## Check style and types, run the tests of this environment
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# The core under AddressSanitizer and UBSan. Both runtimes must be loaded before Python, and libstdc++ with them, whose exceptions they watch.
# Python and torch leave memory to the end of the process, and torch mixes new and free.
SANITIZED = $(CURDIR)/build/sanitized/python
SANITIZED_TESTS ?= tests/runtime/test_oracle.py tests/runtime/test_lists.py tests/package/test_package_safety.py
CXX ?= g++
SANITIZER_LIBRARIES = $$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)

SANITIZED_RUN = LD_PRELOAD="$(SANITIZER_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0 \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) PYTHONSAFEPATH=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
# The emulated CUDA kernels: AddressSanitizer knows red zones between the arrays of their shared memory.
RED_ZONE_TESTS ?= calculator and not plain and (B_static or C1_polysw or E1_moe)

test-sanitized: $(DEV_STAMP)  ## Oracle models, lists and hostile files under AddressSanitizer and UBSan
	MOECALC_WERROR=1 $(BIN)/python setup.py -q build_sanitized
	$(SANITIZED_RUN) $(BIN)/python $(PYTEST) -p no:cacheprovider $(SANITIZED_TESTS) $(PYTEST_ARGS)
	MOECALC_BACKEND=cuda-emulation $(SANITIZED_RUN) $(BIN)/python $(PYTEST) -p no:cacheprovider tests/runtime/test_oracle.py -k "$(RED_ZONE_TESTS)"

# No nvcc is needed. What checks the kernels' parts is in tests/cuda, for `make test-main`.
RACES = $(CURDIR)/build/races/python

test-cuda-checks: $(DEV_STAMP)  ## Race detector of the emulated CUDA kernels
	MOECALC_WERROR=1 $(BIN)/python setup.py -q build_races
	PYTHONPATH=$(RACES) PYTHONSAFEPATH=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 -p no:cacheprovider tests/runtime/test_races.py $(PYTEST_ARGS)

lint: lint-style lint-types  ## Check style and types only

lint-style: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	@if [ -x $(BIN)/clang-format ]; then $(BIN)/clang-format --dry-run -Werror $(CXX_FILES); \
	else echo "clang-format is not installed: the C++ style is not checked"; fi

lint-types: $(DEV_STAMP)
	$(BIN)/mypy

format: $(DEV_STAMP)  ## Format all sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# moecalc is bound to no torch: without the TorchScript backend, which an installation from the sources compiles for the torch that it finds.
# The plugin is a distribution of its own (lammps_plugin/distribution/README.md).
wheel: $(DEV_STAMP)  ## Build wheels of moecalc, with CUDA kernels if there is nvcc, and of its LAMMPS plugin, in dist/
	rm -rf build/wheels
	MOECALC_TORCH=0 MOECALC_LAMMPS=0 MOECALC_CUDA=$(if $(NVCC),1,0) TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" \
	$(PIP) wheel -q --no-build-isolation --no-deps -w build/wheels .
	$(PIP) wheel -q --no-build-isolation --no-deps -w build/wheels ./lammps_plugin/distribution
	rm -f dist/moecalc*.whl
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --strip --exclude libmoecalc.so -w dist build/wheels/*.whl
	@ls -l dist

test-wheel: wheel  ## Install the wheels in a fresh environment without torch and compilers, and run ASE, LAMMPS and the commands there
	MOECALC_WHEELS=$(CURDIR)/dist $(BIN)/python -m pytest tests/distribution/test_wheel.py

demo: $(DEV_STAMP)  ## Package a checkpoint, relax an alloy and run dynamics with it
	$(BIN)/python examples/demo.py

# Also a test: tests/distribution/test_site.py.
docs: $(DEV_STAMP)  ## Build the site of the documentation in site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

screenshots: docs  ## Pictures of the site as wide as a desk and a telephone, in build/screenshots (needs Chromium)
	$(BIN)/python docs/screenshots.py

ifeq ($(NVCC),)
cuda-env test-cuda:
	@echo "nvcc is not on the PATH: the CUDA kernels are not compiled, and nothing is tested with a CUDA build of torch"
else
cuda-env: $(CUDA_STAMP)  ## Set up the second environment: a CUDA build of torch, and moecalc with CUDA kernels

# No GPU is needed: the kernels run emulated on the CPU, and those marked `cuda` where there is one.
test-cuda: $(CUDA_STAMP)  ## Compile the CUDA kernels and test them
	$(CUDA_RUN) -c 'import ctypes, pathlib, moecalc; library = ctypes.CDLL(str(pathlib.Path(moecalc.__file__).with_name("libmoecalc_cuda.so"))); library.moecalc_cuda_info.restype = ctypes.c_char_p; print(library.moecalc_cuda_info().decode())'
	$(CUDA_RUN) $(PYTEST) -p no:cacheprovider tests/runtime/test_oracle.py
	MOECALC_BACKEND=cuda-emulation $(CUDA_RUN) $(PYTEST) -p no:cacheprovider tests/runtime/test_oracle.py
	@if [ -n "$(CUOBJDUMP)" ]; then $(CUDA_RUN) benchmarks/cuda_cycles.py $(CUDA_VENV)/lib/python3*/site-packages/moecalc/libmoecalc_cuda.so \
	--cuobjdump $(CUOBJDUMP) $(if $(findstring release 13.0,$(shell $(NVCC) --version)),--limits benchmarks/cuda_limits.json); else echo "there is no cuobjdump: the machine code is not checked"; fi
endif

clean:  ## Remove what was built, keep the environment
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo_output
	rm -rf lammps_plugin/distribution/build lammps_plugin/distribution/*.egg-info lammps_plugin/distribution/LICENSE
	rm -f moecalc/*.so moecalc/_lammps/*.so moecalc/_build_info.py $(VENV)/.moecalc-* $(CUDA_VENV)/.moecalc

distclean: clean  ## Remove the environment as well
	rm -rf $(VENV) $(CUDA_VENV)

# Torch comes first, so that nothing else decides on its version; with the build tools, whose versions it limits.
$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"expected Python 3.11 to 3.13 (packaging needs TorchScript), got {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(NO_COMPILE) "torch==$(TORCH_VERSION)" "setuptools>=77" wheel "pybind11>=2.13"
	@rm -f $(VENV)/.torch-*
	@touch $@

$(CUDA_TORCH_STAMP):
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PIP) install -q $(NO_COMPILE) "torch==$(CUDA_TORCH_VERSION)" "setuptools>=77" wheel "pybind11>=2.13"
	@command -v cmake >/dev/null || $(CUDA_PIP) install -q $(NO_COMPILE) cmake
	@rm -f $(CUDA_VENV)/.torch-*
	@touch $@

# Not editable: the compiled files in the working tree belong to the first environment.
$(CUDA_STAMP): $(CUDA_TORCH_STAMP) $(NATIVE_SOURCES) $(PYTHON_SOURCES)
	$(CUDA_PIP) install -q $(NO_COMPILE) pytest pytest-xdist hypothesis
	MOECALC_CUDA=$(if $(NVCC),1,0) TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" $(CUDA_PIP) install -q $(NO_COMPILE) --no-build-isolation .
	@touch $@

# The plugin is compiled against the headers in the LAMMPS wheel, so that must be there first.
LAMMPS_WHEEL = $(if $(findstring lammps,$(EXTRAS)),$(shell $(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lammps"])'))

# Not isolated: all that a build needs is here.
$(DEV_STAMP): $(TORCH_STAMP) $(NATIVE_SOURCES) $(INSTALLED_TORCH)
	@command -v cmake >/dev/null || $(PIP) install -q $(NO_COMPILE) cmake
	$(if $(LAMMPS_WHEEL),$(PIP) install -q $(NO_COMPILE) $(LAMMPS_WHEEL))
	MOECALC_CUDA=$(MOECALC_CUDA) $(PIP) install -q $(NO_COMPILE) --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

# --- Training with DeePMD-kit: in the second environment, whose torch is the one that deepmd-kit 3.2.0 is compiled for ---

.PHONY: test-deepmd
DEEPMD_STAMP := $(CUDA_VENV)/.deepmd
DEEPMD_EXTRA = $(shell $(PYTHON) -c 'import shlex, tomllib; print(shlex.join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["deepmd"]))')
DEEPMD_LAMMPS := lammps==2025.7.22.2.0 # that of deepmd-kit[lmp], for pair_style deepmd
# Its library is linked against the CUDA 12 runtime, which pip installs where the linker does not look.
DEEPMD_RUN = LD_LIBRARY_PATH="$$(echo $(CURDIR)/$(CUDA_VENV)/lib/python3*/site-packages/nvidia/cuda_runtime/lib):$$LD_LIBRARY_PATH" $(CUDA_RUN)

test-deepmd: $(DEEPMD_STAMP)  ## Test training with DeePMD-kit
	$(DEEPMD_RUN) -c 'import deepmd.pt'
	$(DEEPMD_RUN) $(PYTEST) -p no:cacheprovider tests/deepmd tests/frames $(PYTEST_ARGS)

$(DEEPMD_STAMP): $(CUDA_STAMP) pyproject.toml
	$(CUDA_PIP) install -q $(NO_COMPILE) $(DEEPMD_EXTRA) $(DEEPMD_LAMMPS)
	@touch $@
