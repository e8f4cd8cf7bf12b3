// 64-bit hashes of values and rows: `components/ingest/hashing.py` defines them, this computes the same.
#pragma once

#include <array>
#include <bit>
#include <charconv>
#include <cstdint>
#include <span>
#include <vector>

namespace lazydp::rows {

// The finaliser of SplitMix64.
inline constexpr uint64_t mix(uint64_t word) {
  word += 0x9E3779B97F4A7C15u;
  word ^= word >> 30;
  word *= 0xBF58476D1CE4E5B9u;
  word ^= word >> 27;
  word *= 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

inline constexpr uint64_t chain(uint64_t hash, uint64_t word) { return mix(hash ^ mix(word)); }

inline constexpr size_t kPositions = 256;
inline constexpr auto kMixedPositions = [] {
  std::array<uint64_t, kPositions> mixed{};
  for (size_t i = 0; i < kPositions; ++i) mixed[i] = mix(i);
  return mixed;
}();

inline uint64_t hash_text(std::span<const uint8_t> text) {
  uint64_t sum = 0;
  const size_t known = text.size() < kPositions ? text.size() : kPositions;
  for (size_t i = 0; i < known; ++i) sum += mix(text[i] ^ kMixedPositions[i]);
  for (size_t i = known; i < text.size(); ++i) sum += mix(text[i] ^ mix(i));
  return chain(sum, text.size());
}

// The hash of a number's decimal digits.
inline uint64_t hash_decimal(int64_t number) {
  char digits[20];
  const auto end = std::to_chars(digits, digits + sizeof digits, number).ptr;
  return hash_text({reinterpret_cast<const uint8_t*>(digits), static_cast<size_t>(end - digits)});
}

// The hashes of numbers' decimal digits. Numbers that stood a little before are not written out anew.
inline void hash_decimals_of(std::span<const int64_t> numbers, std::span<uint64_t> hashes) {
  constexpr size_t kSlots = 1 << 14;
  struct Slot {
    int64_t number = 0;
    uint64_t hash = hash_decimal(0);
  };
  std::vector<Slot> slots(numbers.size() < kSlots ? 1 : kSlots);
  for (size_t row = 0; row < numbers.size(); ++row) {
    const int64_t number = numbers[row];
    Slot& slot = slots[(static_cast<uint64_t>(number) * 0x9E3779B97F4A7C15u >> 50) & (slots.size() - 1)];
    if (slot.number != number) slot = {number, hash_decimal(number)};
    hashes[row] = slot.hash;
  }
}

// The word of a number: its bits as those of an int64 or a double; -0.0 counts as 0.0.
inline uint64_t word_of(double number) { return std::bit_cast<uint64_t>(number + 0.0); }
inline uint64_t word_of(int64_t number) { return static_cast<uint64_t>(number); }

}  // namespace lazydp::rows
