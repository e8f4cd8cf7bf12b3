#!/usr/bin/env bash
# Compiles every CUDA source for sm_80, sm_90 and sm_100, warnings as errors, and checks what the assembler says of the
# kernels: no spills and no stack in ours. Needs nvcc, no GPU and no CUDA build of torch. The resources of every kernel are left in
# build/cuda/resources. The binding is checked for syntax where torch's headers are at hand.
set -euo pipefail
cd "$(dirname "$0")/../../.."

nvcc=${NVCC:-nvcc}
cxx=${CXX:-g++}
python=${PYTHON:-.venv/bin/python}
out=build/cuda
architectures=(80 90 100)
flags=(-std=c++20 -O3 --fmad=false -Ikernels/csrc -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v)
for architecture in "${architectures[@]}"; do
  flags+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
done
mkdir -p "$out"
"$nvcc" --version | tail -1

# An object is kept while it is newer than every source, header and this script.
compile() {
  local name=$1
  if [ -f "$out/$name.o" ] && [ -z "$(find kernels/csrc/cuda kernels/csrc/common -newer "$out/$name.o" -type f)" ]; then return; fi
  rm -f "$out/$name.o"
  if ! "$nvcc" "${flags[@]}" -c "kernels/csrc/cuda/$name.cu" -o "$out/$name.o" >"$out/$name.log" 2>&1; then
    grep -v '^ptxas info\|bytes stack frame' "$out/$name.log"
    return 1
  fi
}

# The unit with CUB takes as long as the others together: two processes, as CI has two cores.
compile group_rows & with_cub=$!
for source in kernels/csrc/cuda/*.cu; do
  name=$(basename "$source" .cu)
  [ "$name" = group_rows ] || compile "$name"
done
wait "$with_cub"

awk -f kernels/csrc/cuda/resources.awk "$out"/*.log | sort >"$out/resources"
ours=$(grep -c '^lazydp' "$out/resources")
bad=$(grep '^lazydp' "$out/resources" | grep -v ' stack 0 spills 0 ' || true)
if [ "$ours" -eq 0 ] || [ -n "$bad" ]; then
  echo "cuda: kernels that spill registers or use a stack:"
  echo "$bad"
  exit 1
fi
echo "cuda: $ours kernels for sm_${architectures[*]}, none spills; registers and shared memory in $out/resources"

if [ -f "$out/binding.ok" ] && [ -z "$(find kernels/csrc -newer "$out/binding.ok" -type f)" ]; then
  echo "cuda: the binding agrees with torch's headers, as before"
elif [ -n "${torch_include:=$("$python" -c 'import torch, os; print(os.path.join(os.path.dirname(torch.__file__), "include"))' 2>/dev/null || true)}" ]; then
  # The toolkit's headers, wherever this nvcc keeps them.
  toolkit=$("$nvcc" --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^.*INCLUDES="-I\([^"]*\)".*$/\1/p' | head -1)
  "$cxx" -std=c++20 -fsyntax-only -Wall -Wextra -Werror -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 \
    -Ikernels/csrc -isystem "$torch_include" ${toolkit:+-isystem "$toolkit"} kernels/csrc/cuda/binding.cpp
  touch "$out/binding.ok"
  echo "cuda: the binding agrees with torch's headers"
else
  echo "cuda: binding not checked, no torch for $python"
fi
