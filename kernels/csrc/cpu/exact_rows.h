// Weighted sums of rows in fixed point (common/exact_sum.h), by vectors: the same bits as its plain form.
#pragma once

#include <cstdint>

#include "common/exact_sum.h"
#include "cpu/sum_rows.h"

namespace lazydp::cpu {

// The grid of a sum, and what the sum is multiplied by before it is added to a row.
struct Grid {
  double size;
  double alpha;
};

// One double, or eight of them, with the integers and floats of the same number. (Vectors are not returned: how would depend on
// the instruction set.)
struct OneDouble {
  using Double = double;
  using Bits = uint64_t;
  static constexpr int64_t kWidth = 1;
  LAZYDP_INLINE void load(const float* from, Double& x) { x = static_cast<double>(*from); }
  LAZYDP_INLINE void store(float* to, const Double& x) { *to = static_cast<float>(x); }
  LAZYDP_INLINE void add_bits(const Double& x, Bits& sum) { sum += bits_of(x); }
  LAZYDP_INLINE void from_bits(const Bits& bits, Double& x) { std::memcpy(&x, &bits, sizeof x); }
};

struct EightDoubles {
  using Double = double __attribute__((vector_size(64)));
  using Bits = uint64_t __attribute__((vector_size(64)));
  static constexpr int64_t kWidth = 8;
  LAZYDP_INLINE void load(const float* from, Double& x) {
    x = __builtin_convertvector(*reinterpret_cast<const Floats8*>(from), Double);
  }
  LAZYDP_INLINE void store(float* to, const Double& x) {
    *reinterpret_cast<Floats8*>(to) = __builtin_convertvector(x, Floats8);
  }
  LAZYDP_INLINE void add_bits(const Double& x, Bits& sum) { sum += reinterpret_cast<Bits>(x); }
  LAZYDP_INLINE void from_bits(const Bits& bits, Double& x) { x = reinterpret_cast<Double>(bits); }
};

// A signed integer as a double, rounded once: by halves, for lack of an instruction below AVX-512DQ.
template <class V>
LAZYDP_INLINE void to_double(const typename V::Bits& signed_integer, typename V::Double& x) {
  const typename V::Bits biased = signed_integer ^ kSign;
  typename V::Double low;
  V::from_bits((biased >> 32) | kHighWord, x);
  V::from_bits((biased & 0xFFFFFFFFu) | kLowWord, low);
  x = (x - kWords) + low;
}

// out += alpha * sum over i of weight(i) row(i), for kVectors vectors of columns from `column` on.
template <class V, int kVectors, class Rows>
LAZYDP_INLINE void add_exact_columns(const Rows& rows, int64_t first, int64_t end, int64_t column, const Grid& grid,
                                     float* out) {
  const double shift = kShift * grid.size;
  const uint64_t nothing = bits_of(shift);  // what a term of 0 adds
  typename V::Bits sums[kVectors];
  for (auto& sum : sums) sum = typename V::Bits{} - static_cast<uint64_t>(end - first) * nothing;
  for (int64_t i = first; i < end; ++i) {
    const float* const row = rows.row(i) + column;
    const double weight = rows.exact_weight(i);
    for (int k = 0; k < kVectors; ++k) {
      typename V::Double value;
      V::load(row + k * V::kWidth, value);
      V::add_bits(value * weight + shift, sums[k]);
    }
  }
  const double scale = grid.alpha * grid.size;
  for (int k = 0; k < kVectors; ++k) {
    float* const to = out + column + k * V::kWidth;
    typename V::Double row, sum;
    V::load(to, row);
    to_double<V>(sums[k], sum);
    V::store(to, row + sum * scale);
  }
}

template <class Rows>
LAZYDP_INLINE void add_exact_sum(const Rows& rows, int64_t first, int64_t end, int64_t columns, const Grid& grid, float* out) {
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) add_exact_columns<EightDoubles, 8>(rows, first, end, c, grid, out);
  for (; c + 32 <= columns; c += 32) add_exact_columns<EightDoubles, 4>(rows, first, end, c, grid, out);
  for (; c + 8 <= columns; c += 8) add_exact_columns<EightDoubles, 1>(rows, first, end, c, grid, out);
  for (; c < columns; ++c) add_exact_columns<OneDouble, 1>(rows, first, end, c, grid, out);
}

}  // namespace lazydp::cpu
