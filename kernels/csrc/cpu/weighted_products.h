// Sums of scaled outer products, over the units of a batch: float32 within a block of units, float64 over blocks.
// Raw pointers, no torch.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace lazydp::cpu {

// out[o, i] += sum over units k, in their order, of (scale[k] grads[k, o]) inputs[k, i].
//
// The units are taken in blocks. Within a block each element is one chain of fused multiply-adds in float32, from the block's
// first unit to its last; the blocks are added to `out` one after the other, in float64. So the bits depend neither on the
// instruction set nor on the number of threads, and what one unit's place changes is bounded (docs/floating-point.md).
// AMX alone adds a block of 16 units or more in another order (weighted_products_amx.h), with a bound of its own.
struct WeightedProduct {
  const float* grads;    // [units, outputs]
  const float* inputs;   // [units, columns]
  const float* scale;    // [units]
  const int64_t* order;  // [units], the unit at each place, or null: as they lie
  int64_t units;
  int64_t outputs;
  int64_t columns;
  int64_t block;  // units, 1 to kMaxBlock
  double* out;    // [outputs, columns]
  bool overwrite;  // begin at 0 instead of at what `out` holds
};

inline constexpr int64_t kMaxBlock = 512;

void weighted_product(const WeightedProduct& job, const Parallel& parallel);

// out[j] += sum over rows k of weights[k] rows[k, j], in float64.
struct WeightedSum {
  const float* rows;      // [count, columns]
  const double* weights;  // [count]
  int64_t count;
  int64_t columns;
  double* out;  // [columns]
};

void weighted_sum(const WeightedSum& job, const Parallel& parallel);

// out = sum + scale noise, formed in float64 and rounded once.
struct NoisedSum {
  const double* sum;   // [count]
  const float* noise;  // [count], or null: none
  double scale;
  int64_t count;
  float* out;  // [count]
};

void noised_sum(const NoisedSum& job, const Parallel& parallel);

}  // namespace lazydp::cpu
