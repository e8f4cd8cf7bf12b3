// Noise on rows: fill, catch up, flush. Raw pointers, no torch.
#pragma once

#include <cstdint>
#include <span>

#include "common/chacha20.h"
#include "common/fill.h"
#include "cpu/parallel.h"

namespace lazydp::cpu {

enum class Distribution : int { kGaussian = 0, kOnes = 1 };

// Rows that catch up to `step` from the step that last[row] names.
struct CatchUp {
  float* weight;        // [num_rows, columns]
  float* momentum;      // the same shape, or null: dimension 1
  int32_t* last;        // [num_rows]
  const int64_t* rows;  // [count] distinct, or null: rows 0 .. count - 1
  int64_t count;
  int64_t columns;
  const float* transition;  // [horizon, 1 or 4]
  const float* factor;      // [horizon, 1 or 3]
  Key key;
  uint32_t table;
  int32_t step;
  Distribution distribution;
  // [count], or null: where the row at each position of the list is to be written besides, [columns], or null.
  float* const* copies = nullptr;
  int64_t first_row = 0;  // number of row 0 in the table that these rows are a shard of: part of the noise's address

  int64_t row(int64_t i) const { return rows ? rows[i] : i; }
};

void fill_normals(const Fill& fill, const Parallel& parallel);
void catch_up_rows(std::span<const CatchUp> jobs, const Parallel& parallel);
void keystream(const Key& key, uint64_t stream, uint32_t counter, uint32_t* out, int64_t count, const Parallel& parallel);

}  // namespace lazydp::cpu
