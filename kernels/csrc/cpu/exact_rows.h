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
  LAZYDP_INLINE void load_bits(const uint64_t* from, Bits& x) { x = *from; }
  LAZYDP_INLINE void store(float* to, const Double& x) { *to = static_cast<float>(x); }
  LAZYDP_INLINE void store_bits(uint64_t* to, const Bits& x) { *to = x; }
  LAZYDP_INLINE void add_bits(const Double& x, Bits& sum) { sum += bits_of(x); }
  LAZYDP_INLINE void to_double(const Bits& signed_integer, Double& x) {
    x = static_cast<double>(static_cast<int64_t>(signed_integer));
  }
};

struct EightDoubles {
  using Double = double __attribute__((vector_size(64)));
  using Bits = uint64_t __attribute__((vector_size(64)));
  using LooseBits = uint64_t __attribute__((vector_size(64), may_alias, aligned(8)));
  static constexpr int64_t kWidth = 8;
  LAZYDP_INLINE void load(const float* from, Double& x) {
    x = __builtin_convertvector(*reinterpret_cast<const Floats8*>(from), Double);
  }
  LAZYDP_INLINE void load_bits(const uint64_t* from, Bits& x) { x = *reinterpret_cast<const LooseBits*>(from); }
  LAZYDP_INLINE void store(float* to, const Double& x) {
    *reinterpret_cast<Floats8*>(to) = __builtin_convertvector(x, Floats8);
  }
  LAZYDP_INLINE void store_bits(uint64_t* to, const Bits& x) { *reinterpret_cast<LooseBits*>(to) = x; }
  LAZYDP_INLINE void add_bits(const Double& x, Bits& sum) { sum += reinterpret_cast<Bits>(x); }
  // Rounded once: by halves, for lack of an instruction.
  LAZYDP_INLINE void to_double(const Bits& signed_integer, Double& x) {
    const Bits biased = signed_integer ^ kSign;
    x = reinterpret_cast<Double>((biased >> 32) | kHighWord);
    x = (x - kWords) + reinterpret_cast<Double>((biased & 0xFFFFFFFFu) | kLowWord);
  }
};

// With AVX-512DQ, which has that instruction.
struct EightDoublesDq : EightDoubles {
  using SignedBits = int64_t __attribute__((vector_size(64)));
  LAZYDP_INLINE void to_double(const Bits& signed_integer, Double& x) {
    x = __builtin_convertvector(reinterpret_cast<SignedBits>(signed_integer), Double);
  }
};

// out += alpha * sum, for the columns from `column` on.
template <class V, int kVectors>
LAZYDP_INLINE void add_grids(const typename V::Bits* sums, int64_t column, const Grid& grid, float* out) {
  const double scale = grid.alpha * grid.size;
  for (int k = 0; k < kVectors; ++k) {
    float* const to = out + column + k * V::kWidth;
    typename V::Double row, sum;
    V::load(to, row);
    V::to_double(sums[k], sum);
    V::store(to, row + sum * scale);
  }
}

// The terms weight(i) row(i), each formed where it is added.
template <class Rows>
struct FormedTerms {
  const Rows& rows;

  LAZYDP_INLINE_MEMBER void fetch(int64_t i) const { rows.fetch(i); }

  // out += alpha * sum over i of term i, for kVectors vectors of columns from `column` on.
  template <class V, int kVectors>
  LAZYDP_INLINE_MEMBER void add_columns(int64_t first, int64_t end, int64_t column, const Grid& grid, float* out) const {
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
    add_grids<V, kVectors>(sums, column, grid, out);
  }
};

// The same terms, formed beforehand, once for each bag, with `form_terms`: one addition is left for each lookup.
template <class Bags>
struct TermsOfBags {
  const uint64_t* in_grids;  // [bags, columns]
  int64_t columns;
  Bags bag;  // of the lookup at a place of the grouping

  LAZYDP_INLINE_MEMBER void fetch(int64_t i) const {
    prefetch_to_read(reinterpret_cast<const float*>(in_grids + bag(i) * columns), 2 * columns);
  }

  template <class V, int kVectors>
  LAZYDP_INLINE_MEMBER void add_columns(int64_t first, int64_t end, int64_t column, const Grid& grid, float* out) const {
    typename V::Bits sums[kVectors] = {};
    for (int64_t i = first; i < end; ++i) {
      const uint64_t* const term = in_grids + bag(i) * columns + column;
      for (int k = 0; k < kVectors; ++k) {
        typename V::Bits part;
        V::load_bits(term + k * V::kWidth, part);
        sums[k] += part;
      }
    }
    add_grids<V, kVectors>(sums, column, grid, out);
  }
};

// out[columns] = weight * row, in grids.
template <class V>
LAZYDP_INLINE void form_terms(const float* row, double weight, double shift, int64_t begin, int64_t end, uint64_t* out) {
  for (int64_t c = begin; c + V::kWidth <= end; c += V::kWidth) {
    typename V::Double value;
    V::load(row + c, value);
    typename V::Bits term = typename V::Bits{} - bits_of(shift);
    V::add_bits(value * weight + shift, term);
    V::store_bits(out + c, term);
  }
}

template <class Eight, class Terms>
LAZYDP_INLINE void add_exact_sum(const Terms& terms, int64_t first, int64_t end, int64_t columns, const Grid& grid, float* out) {
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) terms.template add_columns<Eight, 8>(first, end, c, grid, out);
  for (; c + 32 <= columns; c += 32) terms.template add_columns<Eight, 4>(first, end, c, grid, out);
  for (; c + 8 <= columns; c += 8) terms.template add_columns<Eight, 1>(first, end, c, grid, out);
  for (; c < columns; ++c) terms.template add_columns<OneDouble, 1>(first, end, c, grid, out);
}

}  // namespace lazydp::cpu
