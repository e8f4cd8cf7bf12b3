// Rows of bags, on the device: sums, squared norms, gradient. As noise.h: raw pointers, a stream, no allocation, no wait.
#pragma once

#include <cstdint>

#include "cuda/rows.h"
#include "cuda/stream.h"

namespace lazydp::cuda {

struct BagSum {
  const float* weight;      // [num_rows, columns]
  const int64_t* indices;   // [lookups]
  const int64_t* offsets;   // [bags + 1]
  const float* per_lookup;  // [lookups], or null
  float* out;               // [bags, columns]
  int64_t num_rows;
  int64_t bags;
  int64_t columns;
};
cudaError_t bag_sum(const BagSum& job, cudaStream_t stream);

// As bag_sum, but leaves alone the bags of exactly one lookup (see catch_up_and_sum).
cudaError_t bag_sum_but_single(const BagSum& job, cudaStream_t stream);

struct BagSquaredNorms {
  const int64_t* indices;   // [lookups]
  const int64_t* offsets;   // [features * examples + 1], feature-major
  const float* per_lookup;  // [lookups], or null
  const float* grad;        // [features, examples, columns]
  double* workspace;        // [bag_squared_norms_workspace(features, examples)]
  double* out;              // [examples]
  int64_t features;
  int64_t examples;
  int64_t columns;
  bool add;  // to what is in `out`
};
int64_t bag_squared_norms_workspace(int64_t features, int64_t examples);
cudaError_t bag_squared_norms(const BagSquaredNorms& job, cudaStream_t stream);

struct ScatterAdd {
  float* weight;            // [num_rows, columns]
  const int64_t* rows;      // [groups] distinct, or kNoRow
  const int64_t* order;     // [lookups]
  const int64_t* starts;    // [groups + 1]
  const int64_t* bag;       // [lookups]: the bag of each lookup
  const float* per_lookup;  // [lookups], or null
  const float* grad;        // [bags, columns]
  const float* scale;       // [bags]
  float* workspace;         // [scatter_add_workspace(lookups, columns)], aligned to 16 bytes
  double alpha;
  double grid;  // of exact sums (common/exact_sum.h), or 0: sums in float32
  int64_t num_rows;
  int64_t groups;
  int64_t lookups;
  int64_t bags;
  int64_t columns;
};
int64_t scatter_add_workspace(int64_t lookups, int64_t columns);
cudaError_t scatter_add(const ScatterAdd& job, cudaStream_t stream);

}  // namespace lazydp::cuda
