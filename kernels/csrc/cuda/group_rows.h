// Lookups grouped by row, on the device. The number of distinct rows stays there: see rows.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/rows.h"
#include "cuda/stream.h"

namespace lazydp::cuda {

struct GroupRows {
  const int64_t* indices;  // [lookups]
  int64_t* rows;           // [lookups]: distinct rows, ascending, then kNoRow
  int64_t* order;          // [lookups]: positions sorted by row, stable
  int64_t* starts;         // [lookups + 1]
  void* workspace;         // group_rows_workspace bytes, aligned to 256; none where that is 0
  size_t workspace_bytes;
  int64_t lookups;
  int64_t num_rows;
};
cudaError_t group_rows_workspace(int64_t lookups, int64_t num_rows, size_t* bytes);
cudaError_t group_rows(std::span<const GroupRows> jobs, cudaStream_t stream);

}  // namespace lazydp::cuda
