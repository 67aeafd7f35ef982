# Everything runs in .venv, made here with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(shell find kernels -name '*.cpp' -o -name '*.h')
OLD_TRITON := build/triton-3.6.0
DOCS := $(VENV)/.docs

.PHONY: help install demo demo-gan demo-text test asan lint bench gate docs clean

help:
	@echo "make demo    train a VAE on real handwritten digits (about two minutes, first install apart)"
	@echo "make demo-gan  train a DCGAN on the same digits (some minutes)"
	@echo "make demo-text  train a GPT on the English inside Python (about three minutes)"
	@echo "make test    all tests"
	@echo "make asan    the C++ kernels under AddressSanitizer and UBSan, on all cases and on odd calls"
	@echo "make bench   eager, torch.compile and fused side by side on this machine; a record in bench/results, its page"
	@echo "make gate    compile every Triton kernel for sm_80, 90, 100, 120 and run all on emulated GPUs; no GPU needed"
	@echo "make lint    ruff, and mypy on the public API"
	@echo "make docs    build the documentation into build/site; a warning is an error"
	@echo "make clean   remove what the above made, but not runs/"

install: $(READY)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The build requirements come first: without build isolation CMake keeps its tree and a rebuild takes seconds.
$(READY): $(BIN)/python $(BUILD_INPUTS)
	$(PIP) scikit-build-core nanobind cmake ninja
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/genai-fast demo

demo-gan: $(READY)
	$(BIN)/genai-fast demo-gan

demo-text: $(READY)
	$(BIN)/genai-fast demo-text

# One process a core; threads that wait for each other must not keep the others' cores busy.
test: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

# Leaks are not looked for: Python's own are too many. The newest instruction set here, and the oldest.
ASAN = env PYTHONHASHSEED=0 OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(foreach lib,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))"
asan: $(READY)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/cmake -S . -B build/asan -GNinja -DGENAI_FAST_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/asan
	for isa in "" GENAI_FAST_ISA=portable; do \
	  $(ASAN) $$isa $(BIN)/python tests/native_fuzz.py --extension build/asan/_cpu*.so --numerics --count 8000 \
	    > build/asan/run.log || { tail -n 3 build/asan/run.log; exit 1; }; tail -n 1 build/asan/run.log; \
	done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only --record

gate: $(READY) $(OLD_TRITON)
	$(BIN)/python -m bench.compile_gate --check
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m bench.compile_gate --check
	$(BIN)/python -m bench.emulate --limits
	$(BIN)/python -m bench.emulate
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m bench.emulate
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest -q tests/ops/test_ops.py tests/kernels/test_random.py -k "reference or random"
	PYTHONPATH=$(OLD_TRITON) TRITON_INTERPRET=0 $(BIN)/python -m pytest -q tests/kernels/compiled_plans.py

$(OLD_TRITON):
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps --target $@ triton==3.6.0

$(DOCS): $(READY)
	$(PIP) --no-build-isolation -e ".[docs]"
	@touch $@

# The pages of ops and models are made from the installed package: docs/_site.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build $(VENV) .pytest_cache .ruff_cache .benchmarks .hypothesis genai_fast/_cpu*.so
