// Lookups by row, and the bag of every lookup.
#include <algorithm>
#include <bit>
#include <cstddef>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/bags.h"

namespace lazydp::cpu {
namespace {

constexpr int64_t kBagsPerTask = 16384;
constexpr int kMaxDigitBits = 11;
constexpr int64_t kLookupsPerChunk = 16384;

// Row and position of a lookup in one word, where both fit: the sort moves half the bytes.
struct Packed {
  uint64_t bits;
  Packed() = default;
  Packed(int64_t row, int64_t position) : bits(static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(position)) {}
  int64_t row() const { return static_cast<int64_t>(bits >> 32); }
  int64_t position() const { return static_cast<int64_t>(bits & 0xFFFFFFFF); }
};

struct Wide {
  int64_t row_;
  int64_t position_;
  Wide() = default;
  Wide(int64_t row, int64_t position) : row_(row), position_(position) {}
  int64_t row() const { return row_; }
  int64_t position() const { return position_; }
};

// The lookups in consecutive chunks, one thread on each: every pass counts by chunk, adds up the counts, then places. What
// comes out doesn't depend on the number of chunks.
class Chunks {
 public:
  Chunks(int64_t count, const Parallel& parallel)
      : parallel_(parallel), count_(count), chunks_(std::clamp<int64_t>(count / kLookupsPerChunk, 1, parallel.threads)) {}

  int64_t size() const { return chunks_; }

  // Calls f(chunk, begin, end) for every chunk.
  template <class F>
  void each(const F& f) const {
    parallel_(0, chunks_, 1, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) f(c, c * count_ / chunks_, (c + 1) * count_ / chunks_);
    });
  }

 private:
  const Parallel& parallel_;
  int64_t count_;
  int64_t chunks_;
};

// Stable radix sort of lookups by row.
template <typename Lookup>
class RowSort {
 public:
  RowSort(const int64_t* indices, int64_t count, int64_t num_rows, const Chunks& chunks)
      : chunks_(chunks), lookups_(new Lookup[count]), other_(new Lookup[count]) {
    const int bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(num_rows - 1, 0)));
    const int passes = std::max(1, (bits + kMaxDigitBits - 1) / kMaxDigitBits);
    for (int pass = 0; pass < passes; ++pass) {
      const int from = bits * pass / passes;
      const int digit_bits = bits * (pass + 1) / passes - from;
      if (pass == 0) {
        sort_by_digit([=](int64_t i) { return Lookup(indices[i], i); }, from, digit_bits);
      } else {
        sort_by_digit([this](int64_t i) { return lookups_[i]; }, from, digit_bits);
      }
    }
  }

  const Lookup& operator[](int64_t i) const { return lookups_[i]; }

 private:
  // From lookup(i) for every i into lookups_.
  template <class LookupAt>
  void sort_by_digit(const LookupAt& lookup, int shift, int digit_bits) {
    const int64_t digits = int64_t{1} << digit_bits;
    const auto digit = [=](const Lookup& of) { return (of.row() >> shift) & (digits - 1); };
    places_.assign(digits * chunks_.size(), 0);
    // Each chunk counts in a run of its own: counters of two threads in one cache line made two threads slower than one.
    chunks_.each([&](int64_t chunk, int64_t begin, int64_t end) {
      int64_t* counts = &places_[chunk * digits];
      for (int64_t i = begin; i < end; ++i) ++counts[digit(lookup(i))];
    });
    to_places(digits);
    chunks_.each([&](int64_t chunk, int64_t begin, int64_t end) {
      int64_t* places = &places_[chunk * digits];
      for (int64_t i = begin; i < end; ++i) {
        const Lookup next = lookup(i);
        other_[places[digit(next)]++] = next;
      }
    });
    lookups_.swap(other_);
  }

  // Makes of the counts by chunk and digit the place of each chunk's first lookup of that digit.
  void to_places(int64_t digits) {
    int64_t next = 0;
    for (int64_t digit = 0; digit < digits; ++digit)
      for (int64_t chunk = 0; chunk < chunks_.size(); ++chunk) next += std::exchange(places_[chunk * digits + digit], next);
  }

  const Chunks& chunks_;
  std::unique_ptr<Lookup[]> lookups_;  // not vectors: those would write zeros first
  std::unique_ptr<Lookup[]> other_;
  std::vector<int64_t> places_;  // by chunk, then digit
};

template <typename Lookup>
int64_t group_rows_as(const GroupRows& job, const Parallel& parallel) {
  const Chunks chunks(job.count, parallel);
  const RowSort<Lookup> sorted(job.indices, job.count, job.num_rows, chunks);
  const auto starts_group = [&](int64_t i) { return i == 0 || sorted[i].row() != sorted[i - 1].row(); };
  std::vector<int64_t> group(chunks.size() + 1);
  chunks.each([&](int64_t chunk, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += starts_group(i);
    group[chunk] = count;
  });
  std::exclusive_scan(group.begin(), group.end(), group.begin(), int64_t{0});
  const int64_t groups = group.back();
  chunks.each([&](int64_t chunk, int64_t begin, int64_t end) {
    int64_t next = group[chunk];
    for (int64_t i = begin; i < end; ++i) {
      job.order[i] = sorted[i].position();
      if (!starts_group(i)) continue;
      job.rows[next] = sorted[i].row();
      job.starts[next++] = i;
    }
  });
  job.starts[groups] = job.count;
  return groups;
}

}  // namespace

// A job of several chunks has work for several threads; the others go to one thread each.
void group_rows(std::span<GroupRows> jobs, const Parallel& parallel) {
  constexpr int64_t kPackable = int64_t{1} << 32;
  const auto group = [](GroupRows& job, const Parallel& threads) {
    const bool packable = job.count < kPackable && job.num_rows <= kPackable;
    job.groups = (packable ? group_rows_as<Packed> : group_rows_as<Wide>)(job, threads);
  };
  const auto is_long = [](const GroupRows& job) { return job.count >= 2 * kLookupsPerChunk; };
  for (GroupRows& job : jobs)
    if (is_long(job)) group(job, parallel);
  parallel.each(static_cast<int64_t>(jobs.size()), [&](int64_t j) {
    if (!is_long(jobs[j])) group(jobs[j], kSerial);
  });
}

void bag_of_lookups(std::span<const BagIds> jobs, const Parallel& parallel) {
  JobRanges ranges(parallel);
  for (size_t j = 0; j < jobs.size(); ++j) ranges.add(j, jobs[j].bags, kBagsPerTask);
  ranges.each([&](int64_t j, int64_t begin, int64_t end) {
    const BagIds& job = jobs[j];
    for (int64_t g = begin; g < end; ++g) {
      if (job.offsets[g + 1] - job.offsets[g] == 1) {  // most often, and then a loop costs more than its body
        job.out[job.offsets[g]] = g;
      } else {
        std::fill(job.out + job.offsets[g], job.out + job.offsets[g + 1], g);
      }
    }
  });
}

}  // namespace lazydp::cpu
