// Norms of outer products, over several layers at once, in one pass over their inputs and gradients. Raw pointers, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace lazydp::cpu {

// What one layer saw: of each unit one input a and one output gradient e.
struct LayerPair {
  const float* inputs;  // [units, columns]
  const float* grads;   // [units, outputs]
  int64_t columns;
  int64_t outputs;
  bool weight;  // the unit adds the outer product of e and a
  bool bias;    // the unit adds e
};

// out[k] = sum over layers of |e|^2 |a|^2 (weight) and |e|^2 (bias), of unit k; never below the truth.
//
// Squares of float32 numbers are exact in float64, and neither overflow nor vanish there. A bound on what the additions round is
// added. The bits depend neither on the instruction set nor on the number of threads.
struct ProductNorms {
  std::vector<LayerPair> layers;
  int64_t units;
  double* out;  // [units]
};

void product_norms(const ProductNorms& job, const Parallel& parallel);

}  // namespace lazydp::cpu
