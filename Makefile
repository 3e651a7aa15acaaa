# Two commands on a fresh machine: `make demo` and `make test`. Everything they need goes to .venv and target.
# Needs Rust, Python 3.10+ and a C++ compiler.

SHELL := /bin/bash
PYTHON ?= python3
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# tch asks the Python on the PATH where libtorch is.
export PATH := $(VENV)/bin:$(PATH)
export LIBTORCH_USE_PYTORCH := 1
# NVRTC compiles kernels/; none there: build.rs searches further, and the build goes on without. Looked up anew by each recipe, so
# that a build after `make setup` sees what that installed.
LYCORE_NVRTC ?= $(firstword $(shell ls -d $(VENV)/lib/python3*/site-packages/nvidia/{cu13,cuda_nvrtc}/lib 2>/dev/null))
export LYCORE_NVRTC
export PYTHONPATH := $(CURDIR)/plugin
# Programs that link libtorch (Rust tests, C hosts) find it here; Python has it in the process already.
TORCH_LIB = $(shell $(PY) -c 'import importlib.util,os;print(os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin),"lib"))')
WITH_TORCH = LD_LIBRARY_PATH=$(TORCH_LIB)
# One profile for everything, so that torch-sys (minutes of C++) is compiled once.
FULL := --release
SMALL := --release --no-default-features --target-dir target/small

# PREBUILT=1: use the libraries that are in target/ and the Python that is on the PATH; for machines without Rust.
ifdef PREBUILT
PY := python3
READY :=
endif

.PHONY: all setup lib small header binding plugin demo test lint test-rust test-c test-python test-gpu bench bench-gpu clean

all: lib small

setup: $(READY)

ifndef PREBUILT
$(READY): tests/requirements.txt
	@test -x $(PY) || { echo "setting up $(VENV) (once; torch is a download of about 3 GB)"; $(PYTHON) -m venv $(VENV); }
	@$(PY) -m pip install --quiet --disable-pip-version-check --requirement tests/requirements.txt
	@touch $@
endif

# The build with libtorch: everything, for processes that have this torch.
lib: $(READY)
	$(if $(PREBUILT),,cargo build $(FULL))

# The build without libtorch: load, merge, scale, convert, for any process.
small:
	$(if $(PREBUILT),,cargo build $(SMALL))

# Regenerates what is generated and checked in.
header:
	LYCORE_UPDATE_HEADER=1 cargo test $(SMALL) --test integration header
	$(MAKE) binding

binding:
	$(PYTHON) plugin/generate_binding.py

# Puts both builds inside the Python package, so that the folder `plugin` can be installed or copied.
plugin: lib small
	mkdir -p plugin/lycore/lib
	cp target/small/release/liblycore.so plugin/lycore/lib/liblycore.so
	cp target/release/liblycore.so plugin/lycore/lib/liblycore-torch$(shell $(PY) -c 'import importlib.metadata as m;print(".".join(m.version("torch").split(".")[:2]))').so

demo: lib small
	$(PY) examples/demo.py

test: lint test-rust test-c test-python
	@echo "all tests passed"

lint: $(READY)
	cargo fmt --check
	cargo clippy $(SMALL) --all-targets -- -D warnings
	$(WITH_TORCH) cargo clippy $(FULL) --all-targets -- -D warnings
	ruff check plugin tests examples
	ruff format --check plugin tests examples
	$(PY) plugin/generate_binding.py --check
	$(PY) tests/malformed/make.py --check

test-rust: lib small
	cargo test $(SMALL)
	$(WITH_TORCH) cargo test $(FULL)

test-c: lib small
	tests/c/run.sh target/small/release --asan
	$(WITH_TORCH) tests/c/run.sh target/release --asan

test-python: lib small
	$(PY) -m pytest -q tests/python
	LYCORE_TEST_DEVICE=cpu $(PY) -m pytest -q tests/python/gpu

# On a machine with a GPU; without one every test in it says "skipped: no GPU".
test-gpu: lib small
	$(PY) -m pytest -q -rs tests/python/gpu
	$(WITH_TORCH) tests/c/run.sh target/release --cuda

bench: lib small
	$(PY) tests/bench/merge.py --device cpu
	$(PY) tests/bench/tools.py

bench-gpu: lib
	$(PY) tests/bench/merge.py --device cuda
	$(PY) tests/bench/train.py --device cuda
	$(PY) tests/bench/step.py

clean:
	cargo clean
	rm -rf out
