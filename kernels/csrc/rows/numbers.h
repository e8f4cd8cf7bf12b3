// Numbers for users that are named again and again.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <stdexcept>
#include <vector>

#include "rows/texts.h"

namespace lazydp::rows {

// Numbers n users by (hash, text): equal texts, whose hashes are equal, get one number. A table by hash finds those named
// before. Where it has to look too long, since many texts share a hash, users are sorted instead.
class UserNumbers {
 public:
  UserNumbers(std::span<const uint64_t> hashes, const Texts& users) : hashes_(hashes), users_(users) {
    if (hashes.size() != users.size()) throw std::invalid_argument("users: expected as many as hashes");
    if (hashes.size() >= std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("expected fewer than 2^32 - 1 users");
  }

  // numbers: [n]; firsts: [n], of which the first ones are filled: where each user stands first. Returns how many users.
  size_t fill(std::span<uint32_t> numbers, std::span<uint32_t> firsts) {
    if (!fill_by_table(numbers)) fill_by_sorting(numbers);
    std::vector<uint32_t> by_key(firsts_.size()), rank(firsts_.size());
    std::iota(by_key.begin(), by_key.end(), 0u);
    std::sort(by_key.begin(), by_key.end(), [this](uint32_t left, uint32_t right) { return less(firsts_[left], firsts_[right]); });
    for (uint32_t place = 0; place < by_key.size(); ++place) {
      rank[by_key[place]] = place;
      firsts[place] = firsts_[by_key[place]];
    }
    for (uint32_t& number : numbers) number = rank[number];
    return firsts_.size();
  }

 private:
  struct Slot {
    uint64_t hash;
    uint32_t number;  // one more than the user's; 0: free
  };
  static constexpr size_t kFewestSlots = 1024, kLooksOfEach = 8;

  bool less(uint32_t left, uint32_t right) const {
    if (hashes_[left] != hashes_[right]) return hashes_[left] < hashes_[right];
    const auto one = users_[left], two = users_[right];
    return std::lexicographical_compare(one.begin(), one.end(), two.begin(), two.end());
  }

  bool fill_by_table(std::span<uint32_t> numbers) {
    slots_.assign(kFewestSlots, Slot{});
    size_t looks = kLooksOfEach * (hashes_.size() + kFewestSlots);
    for (size_t row = 0; row < hashes_.size(); ++row) {
      size_t at = hashes_[row] & (slots_.size() - 1);
      while (slots_[at].number != 0 && !is_of(slots_[at], row)) {
        if (looks-- == 0) return false;
        at = (at + 1) & (slots_.size() - 1);
      }
      if (slots_[at].number == 0) {
        firsts_.push_back(static_cast<uint32_t>(row));
        slots_[at] = {hashes_[row], static_cast<uint32_t>(firsts_.size())};
      }
      numbers[row] = slots_[at].number - 1;
      if (2 * firsts_.size() > slots_.size()) grow();
    }
    return true;
  }

  bool is_of(const Slot& slot, size_t row) const {
    return slot.hash == hashes_[row] && equal(users_[firsts_[slot.number - 1]], users_[row]);
  }

  void grow() {
    std::vector<Slot> before(4 * slots_.size());
    std::swap(before, slots_);
    for (const Slot& slot : before) {
      if (slot.number == 0) continue;
      size_t at = slot.hash & (slots_.size() - 1);
      while (slots_[at].number != 0) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = slot;
    }
  }

  void fill_by_sorting(std::span<uint32_t> numbers) {
    std::vector<uint32_t> order(hashes_.size());
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [this](uint32_t left, uint32_t right) { return less(left, right); });
    firsts_.clear();
    for (size_t i = 0; i < order.size(); ++i) {
      if (i == 0 || less(order[i - 1], order[i])) firsts_.push_back(order[i]);
      numbers[order[i]] = static_cast<uint32_t>(firsts_.size() - 1);
    }
  }

  std::span<const uint64_t> hashes_;
  const Texts& users_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> firsts_;  // of each user, in the order in which they are found
};

}  // namespace lazydp::rows
