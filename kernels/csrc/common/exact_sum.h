// Sums that depend neither on the order of their terms nor on the other terms: fixed point, 64 bits.
//
// Each term is formed in float64, rounded once to a multiple of a grid (a power of two), and added as an integer. So what one
// term adds is the same bits whatever else is in the sum. Adding 1.5 * 2^52 grids to a term of absolute value below 2^51 grids
// leaves the rounded term in the low bits of the double: bits = kShifted + n, where n is the term in grids. The integers may
// wrap on the way, as long as the sum is below 2^63 grids.
//
// The grid of a clipped sum is 2^-kGridsPerBound times the bound on what one privacy unit adds, and every term is at most
// 1 / kCancelling bounds: the norms see to that. The argument is in docs/floating-point.md.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace lazydp {

constexpr double kShift = 0x1.8p52;                  // times the grid: what rounds a term to the grid
constexpr uint64_t kHighWord = 0x4530000000000000u;  // 2^84, whose last bit is 2^32
constexpr uint64_t kLowWord = 0x4330000000000000u;   // 2^52, whose last bit is 1
constexpr uint64_t kSign = 0x8000000000000000u;
constexpr double kWords = 0x1p84 + 0x1p63 + 0x1p52;

constexpr int kGridsPerBound = 38;
// A norm is at least this times the largest term.
constexpr double kCancelling = 1.0 / 4096;

// The bits of a double as an integer.
LAZYDP_HD uint64_t bits_of(double x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// A sum of one term needs no grid, and is float32 throughout: alpha (weight value), added to the row. Unless the weight is no normal
// float32: its rounding would then not be relative.
LAZYDP_HD bool is_plain_weight(double weight) {
  const auto single = static_cast<float>(weight < 0.0 ? -weight : weight);
  return single >= 0x1p-126f && single <= 0x1.fffffep127f;
}

// The terms of one sum: n of them, each weight * value.
struct ExactSum {
  uint64_t sum = 0;

  // `shift` is kShift times the grid.
  LAZYDP_HD void add(double weight, float value, double shift) {
    sum += bits_of(weight * static_cast<double>(value) + shift) - bits_of(shift);
  }
  // In grids, rounded to 53 bits.
  LAZYDP_HD double in_grids() const { return static_cast<double>(static_cast<int64_t>(sum)); }
};

}  // namespace lazydp
