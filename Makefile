# Every target sets up what it needs: a virtual environment in .venv, torch, the native build.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml

.PHONY: help demo test lint bench profile lines sanitize soak cuda-check gpu-check clean

help:
	@echo "make demo        the main job: a GPT trained, fine-tuned and talking, in about 3 minutes"
	@echo "make test        linters, type checker and tests"
	@echo "make bench       speed against torch, tiktoken and plain PyTorch, in one run"
	@echo "make profile     where each millisecond of a training step goes, beside the machine's ceilings"
	@echo "make sanitize    the native code's tests under address and undefined-behaviour sanitizers"
	@echo "make soak        the long randomised hunts"
	@echo "make cuda-check  compile the CUDA sources for all architectures (needs nvcc, no GPU)"
	@echo "make gpu-check   build, test and measure on this machine's GPU with the python3 it has"
	@echo "make lines       lines of code per room"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pygpt needs Python 3.11 or later; set PYTHON=python3.12, say"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv: on Debian, apt install python3-venv"; exit 2; }

$(VENV)/.torch: constraints.txt tools/install_torch.py | $(BIN)/python
	@$(BIN)/python tools/install_torch.py
	@touch $@

$(VENV)/.build-tools: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.20" ninja
	@touch $@

# constraints.txt names the tested torch; an own choice (TORCH=...) must not be replaced.
$(VENV)/.constraints: constraints.txt $(VENV)/.torch
	@{ grep -v '^torch==' constraints.txt; \
	  $(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; } > $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.build-tools $(VENV)/.constraints
	@echo "building pygpt"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check --no-build-isolation -c $(VENV)/.constraints -e '.[demo,test,interop-quick]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/pygpt demo $(DEMO)

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/clang-format --dry-run --Werror $$(find csrc fuzz -name '*.cpp' -o -name '*.h' -o -name '*.inl' \
	  -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest $(TESTS)

# bench_shakespeare.py wants the text and minutes, bench_cuda.py a GPU: neither belongs here.
BENCH ?= attention sampling cross_entropy linear generation load tokenizer tokenizer_train train_step
bench: $(VENV)/.installed
	@set -e; for name in $(BENCH); do \
	  echo "== $$name"; $(BIN)/python benchmarks/bench_$$name.py; done

# PROFILE chooses: make profile PROFILE='--shape "gpt2 124M" --dtype bf16'
profile: $(VENV)/.installed
	@$(BIN)/python benchmarks/profile_step.py $(PROFILE)

# SOAK times as many random cases as make test, then the fuzz targets.
SOAK ?= 50
soak: $(VENV)/.installed
	@PYGPT_SOAK=$(SOAK) $(BIN)/python -m pytest tests/test_tokenizer.py tests/test_attention.py \
	  tests/test_sampling.py tests/test_cross_entropy.py tests/test_linear.py
	@$(BIN)/python fuzz/run.py --runs $$((20000 * $(SOAK)))

# The module built with the sanitizers, in a copy of the package; -S keeps the installed one out.
SANITIZE := build/sanitize
SANITIZED_TESTS ?= tests/test_tokenizer*.py tests/test_attention.py tests/test_sampling.py \
  tests/test_cross_entropy.py tests/test_linear.py tests/test_norm.py tests/test_gelu.py \
  tests/test_derivatives.py
sanitize: $(VENV)/.installed
	@mkdir -p $(SANITIZE)/site && rm -rf $(SANITIZE)/site/*
	@cp -r pygpt tests $(SANITIZE)/site && rm -f $(SANITIZE)/site/pygpt/*.so
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZE)/build -G Ninja -DPYGPT_CUDA=OFF \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_BUILD_TYPE=None \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(SANITIZE))/site/pygpt \
	  -DCMAKE_CXX_FLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=undefined" > /dev/null
	@$(BIN)/cmake --build $(SANITIZE)/build
	@cd $(SANITIZE)/site && \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH="$$PWD:$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(abspath $(BIN))/python -S -m pytest -p no:cacheprovider -o pythonpath="$$PWD" \
	  $(SANITIZED_TESTS)

cuda-check:
	@tools/cuda_check.sh

# GPU_CHECK passes on options: make gpu-check GPU_CHECK='--out somewhere'
gpu-check:
	@$(PYTHON) tools/gpu_check.py $(GPU_CHECK)

lines:
	@$(PYTHON) tools/lines.py

clean:
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
