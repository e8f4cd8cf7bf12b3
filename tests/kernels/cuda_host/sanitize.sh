#!/usr/bin/env bash
# The CUDA kernels, compiled for the host, under ASan and UBSan: an access outside a tensor, a misaligned 16-byte access or an
# overflow shows without a GPU. (No race shows: the shim has one thread, and the tests run it in three orders instead.)
set -euo pipefail
cd "$(dirname "$0")/../../.."

cxx=${CXX:-g++}
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
export LD_PRELOAD
export LAZYDP_CUDA_HOST_FLAGS="-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
# Refusals are exceptions by design; the interpreter leaks by design.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
exec .venv/bin/python -m pytest tests/kernels/cuda_host -q -p no:cacheprovider "$@"
