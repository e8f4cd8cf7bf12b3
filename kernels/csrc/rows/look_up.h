// Integers with gaps: their range, and what a table says of each.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <utility>

namespace lazydp::rows {

// n integers as Arrow lays them out. bits: one for each value from `offset` on, 0 where it is missing; empty: none is.
template <class Integer>
struct Integers {
  std::span<const Integer> values;
  std::span<const uint8_t> bits;
  size_t offset;

  void check() const {
    if (!bits.empty() && bits.size() * 8 < offset + values.size()) throw std::invalid_argument("valid: expected a bit for each value");
  }
  bool is_valid(size_t row) const { return bits.empty() || (bits[(offset + row) >> 3] >> ((offset + row) & 7) & 1) != 0; }
};

// The least and the greatest; the greatest comes first where there is none.
template <class Integer>
std::pair<int64_t, int64_t> range_of(const Integers<Integer>& integers) {
  integers.check();
  Integer low = std::numeric_limits<Integer>::max(), high = std::numeric_limits<Integer>::min();
  for (size_t row = 0; row < integers.values.size(); ++row) {
    const Integer value = integers.values[row];
    const bool valid = integers.is_valid(row);
    low = valid && value < low ? value : low;
    high = valid && value > high ? value : high;
  }
  return {low, high};
}

// out[row] = table[value - first]; the last entry of the table is for what is missing.
template <class Integer>
void look_up(const Integers<Integer>& integers, int64_t first, std::span<const float> table, std::span<float> out) {
  integers.check();
  if (table.empty()) throw std::invalid_argument("table: expected at least one entry");
  const size_t missing = table.size() - 1;
  for (size_t row = 0; row < out.size(); ++row) {
    const uint64_t place = static_cast<uint64_t>(integers.values[row]) - static_cast<uint64_t>(first);
    const bool valid = integers.is_valid(row);
    if (valid && place >= missing) throw std::invalid_argument("values: expected places of the table");
    out[row] = table[valid ? place : missing];
  }
}

}  // namespace lazydp::rows
