#!/usr/bin/env bash
# Compiles every CUDA source for every architecture that pygpt ships, without a GPU, and fails where
# ptxas reports spilled registers.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=${NVCC:-$(command -v nvcc || true)}
if [ -z "$nvcc" ]; then
  echo "cuda-check: no nvcc on the PATH; install the CUDA toolkit or set NVCC=/path/to/nvcc" >&2
  exit 2
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$nvcc" --version | tail -n 1
python=${PYTHON:-python3}
if command -v cmake > /dev/null && "$python" -c 'import pybind11' 2> /dev/null; then
  for choice in "" -DCMAKE_CUDA_ARCHITECTURES=90; do  # chosen by CMakeLists.txt, and by the user
    cmake -S . -B "$out/build" -DPYGPT_CUDA=ON -DPython_EXECUTABLE="$(command -v "$python")" \
      -DCMAKE_CUDA_COMPILER="$nvcc" $choice > "$out/report" 2>&1 || { cat "$out/report" >&2; exit 1; }
    grep 'pygpt: CUDA' "$out/report"
    rm -rf "$out/build"
  done
else
  echo "cuda-check: no cmake, or no pybind11 in $python: the configuration was not checked"
fi
for source in csrc/cuda/*.cu; do
  for arch in 80 86 89 90; do
    "$nvcc" -std=c++17 -O3 -Icsrc -Xptxas -v -gencode "arch=compute_$arch,code=sm_$arch" \
      -c "$source" -o "$out/object.o" 2> "$out/report" || { cat "$out/report" >&2; exit 1; }
    if grep -E '[1-9][0-9]* bytes spill' "$out/report" >&2; then
      echo "cuda-check: $source spills registers on sm_$arch" >&2
      exit 1
    fi
    echo "$source sm_$arch ok, $(grep -c 'Compiling entry' "$out/report" || true) kernels"
  done
  "$nvcc" -std=c++17 -O3 -Icsrc -gencode arch=compute_80,code=compute_80 -c "$source" -o "$out/object.o"
  echo "$source compute_80 ok"
done
