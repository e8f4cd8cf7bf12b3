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
  LAZYDP_INLINE void add_exact_product(double a, double b, Double& x) { x += a * b; }
  LAZYDP_INLINE void add_bits(const Double& x, Bits& sum) { sum += bits_of(x); }
  LAZYDP_INLINE void to_double(const Bits& signed_integer, Double& x) {
    x = static_cast<double>(static_cast<int64_t>(signed_integer));
  }
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
  LAZYDP_INLINE void add_exact_product(const Double& a, double b, Double& x) { x += a * b; }
  LAZYDP_INLINE void add_bits(const Double& x, Bits& sum) { sum += reinterpret_cast<Bits>(x); }
  // Rounded once: by halves, for lack of an instruction.
  LAZYDP_INLINE void to_double(const Bits& signed_integer, Double& x) {
    const Bits biased = signed_integer ^ kSign;
    x = reinterpret_cast<Double>((biased >> 32) | kHighWord);
    x = (x - kWords) + reinterpret_cast<Double>((biased & 0xFFFFFFFFu) | kLowWord);
  }
};

// With AVX-512DQ: for code of that target only.
struct EightDoublesDq : EightDoubles {
  using SignedBits = int64_t __attribute__((vector_size(64)));
  // A product that needs no rounding gives the same bits fused. (An intrinsic would not be inlined through code of any target.)
  LAZYDP_INLINE void add_exact_product(const Double& a, double b, Double& x) {
    asm("vfmadd231pd %2, %1, %0" : "+v"(x) : "v"(a), "v"(Double{} + b));
  }
  LAZYDP_INLINE void to_double(const Bits& signed_integer, Double& x) {
    x = __builtin_convertvector(reinterpret_cast<SignedBits>(signed_integer), Double);
  }
};

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
      typename V::Double value, term = typename V::Double{} + shift;
      V::load(row + k * V::kWidth, value);
      if constexpr (Rows::kExactProducts) {
        V::add_exact_product(value, weight, term);
      } else {
        term += value * weight;
      }
      V::add_bits(term, sums[k]);
    }
  }
  const double scale = grid.alpha * grid.size;
  for (int k = 0; k < kVectors; ++k) {
    float* const to = out + column + k * V::kWidth;
    typename V::Double row, sum;
    V::load(to, row);
    V::to_double(sums[k], sum);
    V::store(to, row + sum * scale);
  }
}

template <class Eight, class Rows>
LAZYDP_INLINE void add_exact_sum(const Rows& rows, int64_t first, int64_t end, int64_t columns, const Grid& grid, float* out) {
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) add_exact_columns<Eight, 8>(rows, first, end, c, grid, out);
  for (; c + 32 <= columns; c += 32) add_exact_columns<Eight, 4>(rows, first, end, c, grid, out);
  for (; c + 8 <= columns; c += 8) add_exact_columns<Eight, 1>(rows, first, end, c, grid, out);
  for (; c < columns; ++c) add_exact_columns<OneDouble, 1>(rows, first, end, c, grid, out);
}

}  // namespace lazydp::cpu
