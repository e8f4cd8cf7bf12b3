// Texts to codes: by a keyed hash, or by their places in a declared list.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "rows/blake2b.h"
#include "rows/hashes.h"
#include "rows/texts.h"

namespace lazydp::rows {

// A quick hash, for tables in memory alone.
inline uint64_t quick_hash(std::span<const uint8_t> text) {
  uint64_t hash = text.size();
  size_t done = 0;
  for (; done + 8 <= text.size(); done += 8) {
    uint64_t word;
    std::memcpy(&word, text.data() + done, 8);
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  if (done < text.size()) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + done, text.size() - done);
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return mix(hash);
}

// Codes 1..buckets. A text that stood a little before is not hashed anew; a text that displaces it is, so that no texts
// make this slower than a hash each.
template <class Code>
void hashed_codes(const KeyedBlake2b& keyed, uint64_t buckets, const Texts& texts, std::span<Code> codes) {
  constexpr size_t kMostSlots = 1 << 16;
  constexpr uint32_t kNone = 0;
  if (texts.size() >= std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("expected fewer than 2^32 - 1 texts");
  const size_t slots = std::min(kMostSlots, std::bit_ceil(texts.size() + 1));
  std::vector<uint32_t> last(slots, kNone);  // one more than the row that was here last
  // A row's code is a hash of its own, or that of an earlier row.
  std::vector<uint32_t> same(texts.size()), hashed;
  for (size_t row = 0; row < texts.size(); ++row) {
    const auto text = texts[row];
    uint32_t& slot = last[quick_hash(text) & (slots - 1)];
    const auto own = static_cast<uint32_t>(row);
    if (slot != kNone && equal(texts[slot - 1], text)) {
      same[row] = same[slot - 1];
    } else {
      same[row] = own;
      hashed.push_back(own);
    }
    slot = own + 1;
  }
  std::vector<uint64_t> digests(hashed.size());
  keyed.hash(texts, hashed, digests);
  for (size_t i = 0; i < hashed.size(); ++i) codes[hashed[i]] = static_cast<Code>(1 + digests[i] % buckets);
  for (size_t row = 0; row < texts.size(); ++row) codes[row] = codes[same[row]];
}

// A table of texts by hash with open addressing: slots hold one more than the place of a text, 0 where they are free.
inline void fill_slots(const Texts& known, std::span<uint32_t> slots) {
  if (!std::has_single_bit(slots.size()) || slots.size() < 2 * known.size() || known.size() >> 32 != 0)
    throw std::invalid_argument("slots: expected a power of two, at least twice as many as texts");
  std::fill(slots.begin(), slots.end(), 0u);
  for (size_t place = 0; place < known.size(); ++place) {
    size_t slot = quick_hash(known[place]) & (slots.size() - 1);
    while (slots[slot] != 0) slot = (slot + 1) & (slots.size() - 1);
    slots[slot] = static_cast<uint32_t>(place + 1);
  }
}

// The place of each text among the known ones, counted from 1; 0 where it is none of them.
template <class Code>
void find_texts(const Texts& known, std::span<const uint32_t> slots, const Texts& texts, std::span<Code> codes) {
  if (!std::has_single_bit(slots.size()) || slots.size() < 2 * known.size())
    throw std::invalid_argument("slots: expected those that fill_slots made of the known texts");
  for (size_t row = 0; row < texts.size(); ++row) {
    const auto text = texts[row];
    size_t slot = quick_hash(text) & (slots.size() - 1);
    codes[row] = 0;
    for (size_t tried = 0; slots[slot] != 0 && tried < slots.size(); ++tried) {
      const size_t place = slots[slot] - 1;
      if (place >= known.size()) throw std::invalid_argument("slots: they point outside the known texts");
      if (equal(known[place], text)) {
        codes[row] = static_cast<Code>(place + 1);
        break;
      }
      slot = (slot + 1) & (slots.size() - 1);
    }
  }
}

}  // namespace lazydp::rows
