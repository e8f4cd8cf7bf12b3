// What the binding files of the CPU operators share: torch's threads, and the check of one tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/tensor_arguments.h"
#include "cpu/parallel.h"

namespace lazydp::cpu {

inline Parallel torch_threads() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
    torch::stable::parallel_for(begin, end, grain, [=](int64_t from, int64_t to) { body(from, to, context); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

inline void check(const Tensor& tensor, const char* name, ScalarType type, int64_t dims) {
  if (!tensor.is_cpu()) refuse(name, ": expected a CPU tensor, found one on another device");
  check_layout(tensor, name, type, dims);
}

}  // namespace lazydp::cpu
