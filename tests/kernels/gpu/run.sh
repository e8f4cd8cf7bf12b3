#!/usr/bin/env bash
# What needs a GPU, in one call of under eight minutes: builds the extension with CUDA in place, compares every operator with
# its CPU twin and training on every placement with training on the CPU, runs compute-sanitizer on small shapes, measures.
# Elsewhere one line. Needs torch (with CUDA), nvcc, ninja, pytest, pytest-timeout, scipy, PyYAML, click, rich and what lies in this
# tree; training and its steps also pydantic, from the machine or from the wheels in build/gpu/wheels
# (`tests/kernels/gpu/wheels.sh 3.12` fetches them on a machine with a network). Installs nothing into the machine's Python.
#
#   tests/kernels/gpu/run.sh [folder for logs and figures, default build/gpu]
set -euo pipefail
cd "$(dirname "$0")/../../.."

python=${PYTHON:-$(command -v python3 || true)}
has_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
if ! has_gpu "$python" && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if ! has_gpu "$python"; then
  echo "gpu: skipped, no NVIDIA GPU that torch can use on this machine"
  exit 0
fi

out=${1:-build/gpu}
mkdir -p "$out"
# The four folders under their package names, without an installation.
export PYTHONPATH=$PWD/.typecheck${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import pydantic' 2>/dev/null && compgen -G 'build/gpu/wheels/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" build/gpu/wheels/*.whl
  export PYTHONPATH=$PYTHONPATH:$out/site
fi
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
failed=0

stage() {  # name, seconds, command...
  local name=$1 seconds=$2 begin=$SECONDS
  shift 2
  echo "gpu: $name"
  if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
    tail -3 "$out/$name.log"
  else
    failed=1
    echo "gpu: $name failed; the end of $out/$name.log:"
    tail -40 "$out/$name.log"
  fi
  echo "gpu: $name took $((SECONDS - begin)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST LAZYDP_CUDA=1

stage build 170 "$python" setup.py build_ext --inplace --build-temp "$out/temp"
[ "$failed" -eq 0 ] || exit 1
stage test 100 "$python" -m pytest tests/kernels/gpu -q -p no:cacheprovider
has_pydantic=$("$python" -c 'import pydantic; print("yes")' 2>/dev/null || true)
if [ -n "$has_pydantic" ]; then
  # -W: torch may warn of what the tests of this tree make an error (no CUDA context yet in a thread of autograd).
  mapfile -t training < <(find tests/components -name test_devices.py -o -name test_private_devices.py | sort)
  stage training 90 "$python" -m pytest "${training[@]}" -q -p no:cacheprovider -W default
else
  echo "gpu: no pydantic on this machine (see the top of this script): training was not compared"
  failed=1
fi
# Without torch's caching every tensor is an allocation of its own, and an access beside it is seen.
sanitizer=(compute-sanitizer --error-exitcode 1 --kernel-regex kns=lazydp)
if command -v compute-sanitizer >/dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage memcheck 50 "${sanitizer[@]}" --tool memcheck "$python" tests/kernels/gpu/small_shapes.py
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage racecheck 50 "${sanitizer[@]}" --tool racecheck "$python" tests/kernels/gpu/small_shapes.py
else
  echo "gpu: no compute-sanitizer on this machine"
  failed=1
fi
stage bench 50 "$python" tests/kernels/gpu/bench.py
if [ -n "$has_pydantic" ]; then
  steps() {  # name, arguments of `lazydp bench step`
    local name=$1
    shift
    stage "$name" 60 "$python" -c 'from lazydp.components.bench.cli import step; step()' \
      --shape mlperf --rows 250000 --json --breakdown --device cuda "$@"
  }
  steps step-gpu --repeats 21 --growth 16 --contestant torch_sgd --contestant sgd --contestant lazydp --contestant dpsgd
  steps step-host-tables --repeats 7 --table-device cpu --contestant torch_sgd --contestant sgd --contestant lazydp
fi
cat "$out"/bench.log
[ "$failed" -eq 0 ] && echo "gpu: all passed" || { echo "gpu: something failed"; exit 1; }
