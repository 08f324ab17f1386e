# `make demo` and `make test` set up what they need; either order, and again.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The same line for every use: nothing is compiled while DeepSpeed is installed.
INSTALL_ENV := DS_BUILD_OPS=0 DS_ACCELERATOR=cpu
# The tests of a file share fixtures, and processes that wait for each other leave a core idle.
TWO_AT_ONCE := -n 2 --dist loadfile
# Kernels of torch, MKL, oneDNN and NumPy's OpenBLAS for other processors, and threads. MKL_CBWR is
# for AMD's, on which MKL_ENABLE_INSTRUCTIONS has no effect.
OLD := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
AVX512 := ATEN_CPU_CAPABILITY=avx512 OPENBLAS_CORETYPE=SkylakeX
CPUS := "$(OLD) MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1" \
	"$(OLD) MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=2" \
	"$(AVX2) MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=2" \
	"$(AVX512) MKL_ENABLE_INSTRUCTIONS=AVX512 OMP_NUM_THREADS=2"
NUMERICAL := tests/kernels tests/model tests/training tests/pipeline

.PHONY: help setup demo demo-base test test-all test-gpu test-cpus lint check-install clean

help:
	@echo "make demo      the claim on two cores in minutes, beside a control, as a report page"
	@echo "make demo-base its base, pretrained anew (3 minutes of an H100)"
	@echo "make test      the tests"
	@echo "make test-all  soaks and long fuzz runs too"
	@echo "make test-cpus the numerical tests as other processors and threads compute them"
	@echo "make test-gpu  the tests that run on a GPU (8 minutes on one)"
	@echo "make lint      ruff"
	@echo "make check-install  the requirements against the public torch, on Python 3.11 and 3.12"
	@echo "make clean     the virtual environment and the caches; outputs/ stays"
	@echo
	@echo "torch is installed from where pip is pointed. On the plain index that is the CUDA build"
	@echo "(several GB; it runs on a CPU too). For the small CPU build:"
	@echo "  PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU wheels> make demo"

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	@$(BIN)/python -W ignore -c "import torch; print('torch', torch.__version__, '(CUDA build)' if torch.version.cuda else '(CPU build)')"
	$(INSTALL_ENV) $(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

setup: $(READY)

# The control first: the page of the last run shows both. Stopped, it goes on where it was.
demo: $(READY)
	@echo "1 of 2: the control with a window in every layer"
	$(BIN)/python pipeline/run.py experiment=demo_window
	@echo "2 of 2: the hybrid"
	$(BIN)/python pipeline/run.py experiment=demo

demo-base: $(READY)
	$(BIN)/python pipeline/run.py experiment=demo_base
	$(BIN)/python -m pipeline.stock_llama outputs/demo_base/main/export model/demo_base

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(TWO_AT_ONCE)

test-all: $(READY)
	$(BIN)/python -m pytest $(TWO_AT_ONCE)

# Kernels are compiled on the CPU: several processes share the GPU. The longest tests begin first.
test-gpu: $(READY)
	$(BIN)/python -m pytest -v -n 8 --dist worksteal -m "gpu and not slow" --durations=20 \
	  tests/pipeline tests/training tests/model tests/kernels

test-cpus: $(READY)
	@export OMP_WAIT_POLICY=passive; failed=; for cpu in $(CPUS); do \
		case "$$cpu" in *avx512*) grep -q avx512f /proc/cpuinfo || \
			{ echo "skipped, no AVX-512 here: $$cpu"; continue; };; esac; \
		echo "$$cpu"; \
		env $$cpu $(BIN)/python -m pytest -m "not slow" $(TWO_AT_ONCE) $(NUMERICAL) || \
			failed="$$failed [$$cpu]"; \
	done; test -z "$$failed" || { echo "failed with$$failed"; exit 1; }

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Installs nothing; needs a package index, and says so where there is none.
check-install: $(READY)
	$(BIN)/python .ci/check_install.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
