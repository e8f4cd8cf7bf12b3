// The best of many scores: indices of the k greatest of a row, best first, equal ones by their index.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "cpu/vector_clones.h"

namespace lazydp::rows {

// maxima[g] becomes the greatest of scores[g], scores[g + groups], ... (`members` of them). Scores that are no numbers are passed over.
LAZYDP_VECTOR_CLONES inline void maxima_of_groups(const float* scores, size_t groups, size_t members, float* maxima) {
  for (size_t g = 0; g < groups; ++g) maxima[g] = -std::numeric_limits<float>::infinity();
  for (size_t member = 0; member < members; ++member) {
    const float* part = scores + member * groups;
    for (size_t g = 0; g < groups; ++g) maxima[g] = part[g] > maxima[g] ? part[g] : maxima[g];
  }
}

class BestOfRows {
 public:
  // Writes the indices of up to out.size() best of `scores` into `out`, best first, and returns how many there are. Scores of
  // minus infinity and those that are no numbers are left out.
  size_t find(std::span<const float> scores, std::span<int64_t> out) {
    const size_t n = scores.size(), k = out.size();
    found_.clear();
    // With one group for each wanted entry and more, k groups hold an entry that reaches the k-th greatest of the maxima.
    const size_t members = k == 0 ? 0 : std::min(kMembers, n / (kGroupsPerEntry * k));
    if (members > 1)
      find_in_groups(scores, n / members, members, k);
    else
      for (size_t i = 0; i < n; ++i) keep(scores, i, std::numeric_limits<float>::lowest());
    const size_t count = std::min(k, found_.size());
    const auto end = found_.begin() + static_cast<std::ptrdiff_t>(count);
    if (count < found_.size()) std::nth_element(found_.begin(), end, found_.end());
    std::sort(found_.begin(), end);
    for (size_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(found_[i] & 0xFFFFFFFFu);
    return count;
  }

 private:
  static constexpr size_t kMembers = 32;
  static constexpr size_t kGroupsPerEntry = 4;

  void find_in_groups(std::span<const float> scores, size_t groups, size_t members, size_t k) {
    maxima_.resize(groups);
    maxima_of_groups(scores.data(), groups, members, maxima_.data());
    ordered_ = maxima_;
    std::nth_element(ordered_.begin(), ordered_.begin() + static_cast<std::ptrdiff_t>(k - 1), ordered_.end(), std::greater<float>());
    const float floor = std::max(ordered_[k - 1], std::numeric_limits<float>::lowest());
    for (size_t g = 0; g < groups; ++g) {
      if (maxima_[g] < floor) continue;
      for (size_t member = 0; member < members; ++member) keep(scores, member * groups + g, floor);
    }
    for (size_t i = groups * members; i < scores.size(); ++i) keep(scores, i, floor);
  }

  void keep(std::span<const float> scores, size_t index, float floor) {
    if (scores[index] >= floor) found_.push_back(word_of(scores[index], index));
  }

  // One word that is smaller for a greater score, and for equal ones by the index: one comparison orders two entries.
  static uint64_t word_of(float score, size_t index) {
    const auto bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes 0, which is equal to it
    const uint32_t descending = bits >> 31 ? bits : ~(bits | 0x80000000u);
    return static_cast<uint64_t>(descending) << 32 | index;
  }

  std::vector<float> maxima_, ordered_;
  std::vector<uint64_t> found_;
};

// For each of counts.size() rows of `scores` its best indices, in as many entries of `out` as there are for each row.
inline void best_of_rows(std::span<const float> scores, std::span<int64_t> out, std::span<int64_t> counts) {
  const size_t rows = counts.size();
  if (rows == 0) return;
  if (scores.size() % rows != 0 || out.size() % rows != 0) throw std::invalid_argument("scores, out: expected equally long rows");
  const size_t n = scores.size() / rows, k = out.size() / rows;
  if (n > std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("scores: expected fewer than 2^32 in a row");
  BestOfRows best;
  for (size_t row = 0; row < rows; ++row)
    counts[row] = static_cast<int64_t>(best.find(scores.subspan(row * n, n), out.subspan(row * k, k)));
}

}  // namespace lazydp::rows
