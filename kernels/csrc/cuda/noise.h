// Noise on rows, on the device: fill, catch up, flush, and catch up with the gather of bags. Raw pointers to device memory
// (or to host memory that the device can reach) and a stream; no torch. Launchers neither allocate nor wait.
// Key and step are arguments of the kernels: a captured launch would repeat its noise (binding.cpp refuses). What is wrong in
// the memory they are given stops the kernel (LAZYDP_REFUSE in launch.cuh).
#pragma once

#include <cstdint>

#include "common/chacha20.h"
#include "common/fill.h"
#include "cuda/bags.h"
#include "cuda/rows.h"
#include "cuda/stream.h"

namespace lazydp::cuda {

// Rows that catch up to `step` from the step that last[row] names.
struct CatchUp {
  float* weight;        // [num_rows, columns]
  float* momentum;      // the same shape, or null: dimension 1
  int32_t* last;        // [num_rows]
  const int64_t* rows;  // [count] distinct, or kNoRow; null: rows 0 .. count - 1
  int64_t count;
  int64_t num_rows;
  int64_t columns;
  const float* transition;  // [horizon, 1 or 4]
  const float* factor;      // [horizon, 1 or 3]
  int64_t horizon;
  Key key;
  uint32_t table;
  int32_t step;
  bool ones;              // every normal is 1 (tests of exactness)
  int64_t first_row = 0;  // number of row 0 in the table that these rows are a shard of: part of the noise's address
};

// The bags that read the rows of a CatchUp: lookup order[j], starts[i] <= j < starts[i + 1], reads rows[i].
struct Bags {
  const int64_t* order;   // [lookups]
  const int64_t* starts;  // [count + 1]
  const int64_t* bag;     // [lookups]: the bag of each lookup
};

cudaError_t fill_normals(const Fill& job, cudaStream_t stream);

// Catch-up of job.rows; with null rows, the flush.
cudaError_t catch_up_rows(const CatchUp& job, cudaStream_t stream);

// catch_up_rows, then bag_sum, of the same table. A bag of one lookup gets its row in the pass that catches it up.
cudaError_t catch_up_and_sum(const CatchUp& job, const Bags& bags, const BagSum& sum, cudaStream_t stream);

}  // namespace lazydp::cuda
