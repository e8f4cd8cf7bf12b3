#!/usr/bin/env bash
# Builds the cores of the CPU kernels, and those that read logs, with their native tests under ASan with UBSan, and under TSan,
# and runs them. With --check, the native tests are only compiled, without code: `make test` sees so that they fit the kernels.
set -euo pipefail

root=$(cd "$(dirname "$0")/../../.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
csrc=$root/kernels/csrc
kernels=("$root/tests/kernels/native/kernels_test.cpp"
  "$csrc"/cpu/{bag_sq_norms,bag_sum,group_rows,scatter_add,catch_up_bag_sum,noise,noise_avx2,noise_avx512,noise_portable,product_norms,product_tiles_avx2,product_tiles_avx512,product_tiles_portable,simd_level,weighted_products,weighted_products_amx}.cpp)
rows=("$root/tests/kernels/native/rows_test.cpp" "$csrc"/rows/blake2b_{avx2,avx512,levels}.cpp)
flags=(-std=c++20 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror -pthread "-I$csrc")

if [ "${1:-}" = --check ]; then
  "${CXX:-c++}" "${flags[@]}" -fsyntax-only "${kernels[0]}" "${rows[0]}"
  exit
fi

run() { # name, flags of the sanitizer
  local name=$1
  shift
  echo "sanitize: $name"
  "${CXX:-c++}" "${flags[@]}" "$@" "${kernels[@]}" -o "$build/kernels-$name"
  "$build/kernels-$name"
  "${CXX:-c++}" "${flags[@]}" "$@" "${rows[@]}" -o "$build/rows-$name"
  "$build/rows-$name"
}

export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_init_order=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1
run address-undefined -fsanitize=address,undefined -fno-sanitize-recover=all
run thread -fsanitize=thread
