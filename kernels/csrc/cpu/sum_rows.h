// Weighted sums of rows, column by column in vectors that stay in registers.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace lazydp::cpu {

constexpr int64_t kFloatsPerCacheLine = 16;
constexpr int64_t kPrefetchDistance = 8;  // rows ahead; a row of 128 floats is 8 cache lines

LAZYDP_INLINE void prefetch_to_read(const float* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kFloatsPerCacheLine) __builtin_prefetch(row + c, 0);
}

LAZYDP_INLINE void prefetch_to_write(const float* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kFloatsPerCacheLine) __builtin_prefetch(row + c, 1);
}

// Vectors as GCC and Clang know them, of any float in memory.
using Floats4 = float __attribute__((vector_size(16), may_alias, aligned(4)));
using Floats8 = float __attribute__((vector_size(32), may_alias, aligned(4)));
using Floats16 = float __attribute__((vector_size(64), may_alias, aligned(4)));

// use(column, sum) for kVectors vectors of columns from `column` on, each the sum over i of weight(i) row(i) there. The sums
// stay in registers: kept in memory they cost twice the time.
template <class Vector, int kVectors, class Rows, class Use>
LAZYDP_INLINE void sum_columns(const Rows& rows, int64_t first, int64_t end, int64_t column, const Use& use) {
  Vector sums[kVectors] = {};
  for (int64_t i = first; i < end; ++i) {
    if (column == 0) rows.fetch_ahead_of(i);
    const auto* row = reinterpret_cast<const Vector*>(rows.row(i) + column);
    const float w = rows.weight(i);
    for (int k = 0; k < kVectors; ++k) sums[k] += w * row[k];
  }
  constexpr int64_t kWidth = sizeof(Vector) / sizeof(float);
  for (int k = 0; k < kVectors; ++k) use(column + k * kWidth, sums[k]);
}

// sum_columns of all columns.
template <class Rows, class Use>
LAZYDP_INLINE void sum_rows(const Rows& rows, int64_t first, int64_t end, int64_t columns, const Use& use) {
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) sum_columns<Floats16, 4>(rows, first, end, c, use);
  for (; c + 32 <= columns; c += 32) sum_columns<Floats16, 2>(rows, first, end, c, use);
  for (; c + 16 <= columns; c += 16) sum_columns<Floats16, 1>(rows, first, end, c, use);
  for (; c + 8 <= columns; c += 8) sum_columns<Floats8, 1>(rows, first, end, c, use);
  for (; c + 4 <= columns; c += 4) sum_columns<Floats4, 1>(rows, first, end, c, use);
  for (; c < columns; ++c) sum_columns<float, 1>(rows, first, end, c, use);
}

struct StoreAt {
  float* out;
  template <class Vector>
  LAZYDP_INLINE_MEMBER void operator()(int64_t column, const Vector& sum) const {
    *reinterpret_cast<Vector*>(out + column) = sum;
  }
};

}  // namespace lazydp::cpu
