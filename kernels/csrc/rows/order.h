// The order of rows: by part, and by group, time and content.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

namespace lazydp::rows {

// The keys of n rows in the order in which they count; those that a log lacks are empty.
struct Keys {
  std::span<const uint64_t> group;
  std::span<const int64_t> time;
  std::span<const double> time_part;
  std::span<const uint64_t> content;
};

inline uint64_t part_of_hash(uint64_t hash, uint64_t parts) { return ((hash >> 32) * parts) >> 32; }

// Rows by part, stably: `order` int64 [n], and in `ends` where each part's rows end.
inline void order_by_part(std::span<const uint64_t> hashes, std::span<int64_t> ends, std::span<int64_t> order) {
  const uint64_t parts = ends.size();
  std::fill(ends.begin(), ends.end(), 0);
  for (const uint64_t hash : hashes) ++ends[part_of_hash(hash, parts)];
  int64_t before = 0;
  for (int64_t& end : ends) {
    const int64_t count = end;
    end = before;
    before += count;
  }
  for (size_t row = 0; row < hashes.size(); ++row) order[ends[part_of_hash(hashes[row], parts)]++] = static_cast<int64_t>(row);
}

// Sorts rows by their keys. The high bits of the group part them into short runs, which stay in the cache; within a run they
// are sorted by one word of bits of group and time, and where that decides nothing by the keys themselves.
class RowOrder {
 public:
  explicit RowOrder(const Keys& keys) : keys_(keys) {
    if (keys.group.size() > std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("expected fewer than 2^32 rows");
  }

  // Fills order[n].
  void sort(std::span<int64_t> order) {
    scatter();
    size_t from = 0;
    for (const size_t to : ends_) {
      const auto run = std::span(entries_).subspan(from, to - from);
      std::sort(run.begin(), run.end(), [](const Entry& left, const Entry& right) { return left.word < right.word; });
      settle(run);
      from = to;
    }
    for (size_t i = 0; i < entries_.size(); ++i) order[i] = entries_[i].row;
  }

 private:
  struct Entry {
    uint64_t word;
    uint32_t row;
  };
  static constexpr size_t kRun = 256;
  static constexpr size_t kMostRuns = 4096;
  // Bits of a word that are the group's; the others are the time's.
  static constexpr int kGroupBits = 24;

  bool less(uint32_t left, uint32_t right) const {
    if (keys_.group[left] != keys_.group[right]) return keys_.group[left] < keys_.group[right];
    if (!keys_.time.empty() && keys_.time[left] != keys_.time[right]) return keys_.time[left] < keys_.time[right];
    if (!keys_.time_part.empty() && keys_.time_part[left] != keys_.time_part[right])
      return keys_.time_part[left] < keys_.time_part[right];
    if (!keys_.content.empty() && keys_.content[left] != keys_.content[right]) return keys_.content[left] < keys_.content[right];
    return left < right;
  }

  // Puts in order what the words leave open: equal words, and groups that agree in the bits that are in them.
  void settle(std::span<Entry> run) const {
    const auto by_keys = [this](const Entry& left, const Entry& right) { return less(left.row, right.row); };
    constexpr int kTimeBits = 64 - kGroupBits;
    size_t from = 0;
    while (from < run.size()) {
      size_t to = from + 1;
      bool one_group = true, tied = false;
      for (; to < run.size() && run[to].word >> kTimeBits == run[from].word >> kTimeBits; ++to) {
        one_group &= keys_.group[run[to].row] == keys_.group[run[from].row];
        tied |= run[to].word == run[to - 1].word;
      }
      const auto part = run.subspan(from, to - from);
      if (!one_group)
        std::sort(part.begin(), part.end(), by_keys);
      else if (tied)
        settle_ties(part, by_keys);
      from = to;
    }
  }

  template <class Less>
  static void settle_ties(std::span<Entry> part, const Less& by_keys) {
    size_t from = 0;
    while (from < part.size()) {
      size_t to = from + 1;
      while (to < part.size() && part[to].word == part[from].word) ++to;
      if (to - from > 1) std::sort(part.begin() + static_cast<int64_t>(from), part.begin() + static_cast<int64_t>(to), by_keys);
      from = to;
    }
  }

  static int bits(uint64_t number) { return static_cast<int>(std::bit_width(number)); }

  // The high bits of a row's time, counted from the earliest, in as many bits as a word has for them.
  auto time_words() const {
    const auto times = keys_.time;
    uint64_t earliest = 0;
    int excess = 0;
    if (!times.empty()) {
      const auto [low, high] = std::minmax_element(times.begin(), times.end());
      earliest = static_cast<uint64_t>(*low);
      excess = std::max(0, bits(static_cast<uint64_t>(*high) - earliest) - (64 - kGroupBits));
    }
    return [times, earliest, excess](size_t row) {
      return times.empty() ? uint64_t{0} : (static_cast<uint64_t>(times[row]) - earliest) >> excess;
    };
  }

  void scatter() {
    const auto groups = keys_.group;
    entries_.resize(groups.size());
    if (groups.empty()) return;
    const auto [low, high] = std::minmax_element(groups.begin(), groups.end());
    const uint64_t lowest = *low;
    const size_t runs = std::clamp<size_t>(std::bit_ceil(groups.size() / kRun + 1), 2, kMostRuns);
    // So many bits that the largest difference falls into the last run or before it.
    const int shift = std::max(0, bits(*high - lowest) - bits(runs - 1));
    ends_.assign(runs, 0);
    for (const uint64_t hash : groups) ++ends_[(hash - lowest) >> shift];
    size_t before = 0;
    for (size_t& end : ends_) {
      const size_t count = end;
      end = before;
      before += count;
    }
    const auto word_of_time = time_words();
    const int below = std::max(0, shift - kGroupBits);
    const uint64_t mask = (uint64_t{1} << kGroupBits) - 1;
    for (size_t row = 0; row < groups.size(); ++row) {
      const uint64_t place = groups[row] - lowest;
      const uint64_t word = ((place >> below) & mask) << (64 - kGroupBits) | word_of_time(row);
      entries_[ends_[place >> shift]++] = {word, static_cast<uint32_t>(row)};
    }
  }

  Keys keys_;
  std::vector<Entry> entries_;
  std::vector<size_t> ends_;
};

}  // namespace lazydp::rows
