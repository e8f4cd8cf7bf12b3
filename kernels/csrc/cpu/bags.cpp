#include "cpu/bags.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "common/macros.h"
#include "cpu/vector_clones.h"

namespace lazydp::cpu {
namespace {

constexpr int64_t kFloatsPerTask = 16384;
constexpr int64_t kBagsPerTask = 16384;
constexpr int64_t kFloatsPerCacheLine = 16;
constexpr int64_t kPrefetchDistance = 8;  // rows ahead; a row of 128 floats is 8 cache lines

LAZYDP_INLINE void prefetch_to_read(const float* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kFloatsPerCacheLine) __builtin_prefetch(row + c, 0);
}

LAZYDP_INLINE void prefetch_to_write(const float* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kFloatsPerCacheLine) __builtin_prefetch(row + c, 1);
}

// ---- grouping ----

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
      : parallel_(parallel), count_(count),
        chunks_(std::clamp<int64_t>(count / kLookupsPerChunk, 1, parallel.threads)) {}

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
      for (int64_t chunk = 0; chunk < chunks_.size(); ++chunk)
        next += std::exchange(places_[chunk * digits + digit], next);
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

int64_t rows_per_task(int64_t columns) { return 1 + kFloatsPerTask / (1 + columns); }

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

namespace {

// ---- sums ----

// Vectors as GCC and Clang know them, of any float in memory.
using Floats4 = float __attribute__((vector_size(16), may_alias, aligned(4)));
using Floats8 = float __attribute__((vector_size(32), may_alias, aligned(4)));
using Floats16 = float __attribute__((vector_size(64), may_alias, aligned(4)));

// use(column, sum) for kVectors vectors of columns from `column` on, each the sum over i of weight(i) row(i) there. The sums
// stay in registers: kept in memory they cost twice the time.
template <class Vector, int kVectors, class Rows, class Use>
LAZYDP_INLINE void sum_columns(const Rows& rows, int64_t first, int64_t end, int64_t column, const Use& use) {
  Vector sums[kVectors] = {};
  for (int64_t i = first; i < end; ++i) {
    if (column == 0) rows.fetch_ahead_of(i);
    const auto* row = reinterpret_cast<const Vector*>(rows.row(i) + column);
    const float w = rows.weight(i);
    for (int k = 0; k < kVectors; ++k) sums[k] += w * row[k];
  }
  constexpr int64_t kWidth = sizeof(Vector) / sizeof(float);
  for (int k = 0; k < kVectors; ++k) use(column + k * kWidth, sums[k]);
}

// sum_columns of all columns.
template <class Rows, class Use>
LAZYDP_INLINE void sum_rows(const Rows& rows, int64_t first, int64_t end, int64_t columns, const Use& use) {
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) sum_columns<Floats16, 4>(rows, first, end, c, use);
  for (; c + 32 <= columns; c += 32) sum_columns<Floats16, 2>(rows, first, end, c, use);
  for (; c + 16 <= columns; c += 16) sum_columns<Floats16, 1>(rows, first, end, c, use);
  for (; c + 8 <= columns; c += 8) sum_columns<Floats8, 1>(rows, first, end, c, use);
  for (; c + 4 <= columns; c += 4) sum_columns<Floats4, 1>(rows, first, end, c, use);
  for (; c < columns; ++c) sum_columns<float, 1>(rows, first, end, c, use);
}

struct StoreAt {
  float* out;
  template <class Vector>
  LAZYDP_INLINE_MEMBER void operator()(int64_t column, const Vector& sum) const {
    *reinterpret_cast<Vector*>(out + column) = sum;
  }
};

// The rows that lookups of bags read, by the number of the lookup.
struct ReadRows {
  const BagSum& job;
  int64_t last;  // lookup that is fetched no more

  LAZYDP_INLINE_MEMBER void fetch_ahead_of(int64_t i) const {
    if (i + kPrefetchDistance < last) prefetch_to_read(row(i + kPrefetchDistance), job.columns);
  }
  LAZYDP_INLINE_MEMBER const float* row(int64_t i) const { return job.weight + job.indices[i] * job.columns; }
  LAZYDP_INLINE_MEMBER float weight(int64_t i) const { return job.per_lookup ? job.per_lookup[i] : 1.0f; }
};

LAZYDP_INLINE void sum_bag(const BagSum& job, int64_t g, int64_t last) {
  sum_rows(ReadRows{job, last}, job.offsets[g], job.offsets[g + 1], job.columns, StoreAt{job.out + g * job.columns});
}

LAZYDP_INLINE bool is_single(const BagSum& job, int64_t g) { return job.offsets[g + 1] - job.offsets[g] == 1; }

}  // namespace

LAZYDP_VECTOR_CLONES
void sum_bags(const BagSum& job, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) sum_bag(job, g, job.offsets[end]);
}

void bag_sum(std::span<const BagSum> jobs, const Parallel& parallel) {
  JobRanges ranges(parallel);
  for (size_t j = 0; j < jobs.size(); ++j) ranges.add(j, jobs[j].bags, rows_per_task(jobs[j].columns));
  ranges.each([&](int64_t j, int64_t begin, int64_t end) { sum_bags(jobs[j], begin, end); });
}

LAZYDP_VECTOR_CLONES
void sum_bags_but_single(const BagSum& job, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g)
    if (!is_single(job, g)) sum_bag(job, g, job.offsets[end]);
}

int64_t single_bags(const BagSum& job) {
  int64_t count = 0;
  for (int64_t g = 0; g < job.bags; ++g) count += is_single(job, g);
  return count;
}

void single_bags_of_rows(const BagSum& job, const Grouping& groups, int64_t begin, int64_t end, float** copies) {
  for (int64_t u = begin; u < end; ++u) {
    copies[u] = nullptr;
    if (groups.starts[u] == groups.starts[u + 1]) continue;
    const int64_t lookup = groups.order[groups.starts[u]];
    const int64_t g = groups.bag[lookup];
    const bool as_it_is = !job.per_lookup || job.per_lookup[lookup] == 1.0f;
    if (as_it_is && is_single(job, g)) copies[u] = job.out + g * job.columns;
  }
}

LAZYDP_VECTOR_CLONES
void rows_to_other_single_bags(const BagSum& job, const Grouping& groups, int64_t begin, int64_t end, float* const* copies) {
  const ReadRows rows{job, 0};
  for (int64_t u = begin; u < end; ++u) {
    for (int64_t i = groups.starts[u] + (copies[u] != nullptr); i < groups.starts[u + 1]; ++i) {
      const int64_t lookup = groups.order[i];
      const int64_t g = groups.bag[lookup];
      if (is_single(job, g)) sum_rows(rows, lookup, lookup + 1, job.columns, StoreAt{job.out + g * job.columns});
    }
  }
}

namespace {

// ---- norms ----

LAZYDP_VECTOR_CLONES
double squared_norm(const float* x, int64_t columns) {
  constexpr int kSums = 32;  // one vector of sums would wait for each addition
  double sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= columns; c += kSums)
    for (int k = 0; k < kSums; ++k) sums[k] += static_cast<double>(x[c + k]) * static_cast<double>(x[c + k]);
  for (int k = 0; c + k < columns; ++k) sums[k] += static_cast<double>(x[c + k]) * static_cast<double>(x[c + k]);
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}

// The lookups of one example, few enough that comparing all with all by vectors beats hashing.
class FewLookups {
 public:
  static constexpr int64_t kMost = 192;

  FewLookups(const int64_t* rows, const float* weights, int64_t count) : count_(count), rows_(rows), weights_(weights) {}

  // The sum over distinct rows of (the sum of a row's weights)^2, as that of w_j w_k over all pairs of lookups of one row.
  double sum_over_rows() const {
    if (!rows_are_short() || !weights_are_equal()) return sum_of_products();
    const double weight = weights_ ? static_cast<double>(weights_[0]) : 1.0;
    return weight * weight * static_cast<double>(pairs_of_one_row());
  }

 private:
  using Ints = int32_t __attribute__((vector_size(64), may_alias));
  using Longs = int64_t __attribute__((vector_size(32), may_alias));
  using Doubles = double __attribute__((vector_size(32), may_alias));
  static constexpr int64_t kInts = 16;
  static constexpr int kVectors = 4;  // of sums at once, to hide the latency of an addition
  static constexpr int64_t kSide = 4 * kVectors;

  bool rows_are_short() const {
    int64_t all = 0;
    for (int64_t j = 0; j < count_; ++j) all |= rows_[j];
    return all >> 31 == 0;
  }

  bool weights_are_equal() const {
    return !weights_ || std::all_of(weights_, weights_ + count_, [&](float weight) { return weight == weights_[0]; });
  }

  // Pairs (j, k), those of a lookup with itself too, whose rows are equal.
  LAZYDP_VECTOR_CLONES
  int64_t pairs_of_one_row() const {
    alignas(64) int32_t rows[kMost];
    for (int64_t j = 0; j < count_; ++j) rows[j] = static_cast<int32_t>(rows_[j]);
    for (int64_t j = count_; j % kInts != 0; ++j) rows[j] = -1;  // no row
    Ints minus_equal = {};
    for (int64_t j = 0; j < count_; j += kInts) {
      const auto& some = *reinterpret_cast<const Ints*>(rows + j);
      for (int64_t k = 0; k < count_; ++k) minus_equal += some == rows[k];
    }
    int64_t pairs = 0;
    for (int64_t j = 0; j < kInts; ++j) pairs -= minus_equal[j];
    return pairs;
  }

  LAZYDP_VECTOR_CLONES
  double sum_of_products() const {
    alignas(32) int64_t rows[kMost];
    alignas(32) double weights[kMost];
    for (int64_t j = 0; j < count_; ++j) {
      rows[j] = rows_[j];
      weights[j] = weights_ ? static_cast<double>(weights_[j]) : 1.0;
    }
    for (int64_t j = count_; j % kSide != 0; ++j) rows[j] = weights[j] = 0;  // without weight they count nothing
    Doubles sum = {};
    for (int64_t j = 0; j < count_; j += kSide) {
      const auto* some_rows = reinterpret_cast<const Longs*>(rows + j);
      const auto* some_weights = reinterpret_cast<const Doubles*>(weights + j);
      Doubles equal[kVectors] = {};
      for (int64_t k = 0; k < count_; ++k)
        for (int v = 0; v < kVectors; ++v) equal[v] += some_rows[v] == rows[k] ? Doubles{} + weights[k] : Doubles{};
      for (int v = 0; v < kVectors; ++v) sum += some_weights[v] * equal[v];
    }
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }

  int64_t count_;
  const int64_t* rows_;
  const float* weights_;
};

// The squared norm of what one example sends to the table. Reused over examples, so that it allocates once.
// Equal rows meet in a hash table: sorting the lookups took ten times as long.
class ExampleNorm {
 public:
  explicit ExampleNorm(const BagSquaredNorms& job) : job_(job) {}

  double operator()(int64_t example) {
    if (job_.features == 1 && bag_size(example) <= FewLookups::kMost) return norm_of_few(example);
    collect(example);
    of_feature_.assign(job_.features, -1.0);
    double norm = 0.0;
    for (const size_t slot : taken_) {  // in the order in which rows first appeared: one order of addition
      const Weighted& lookup = lookups_[slots_[slot]];
      norm += lookup.earlier == kNone ? lookup.weight * lookup.weight * norm_of_feature(lookup.feature, example)
                                      : norm_of_row(slots_[slot], example);
      slots_[slot] = kNone;
    }
    taken_.clear();
    return norm;
  }

 private:
  static constexpr int64_t kNone = -1;

  // The lookups of one row by one feature; `earlier` are those of the same row by the feature before.
  struct Weighted {
    int64_t row;
    int64_t feature;
    int64_t earlier;
    double weight;
  };

  const float* gradient(int64_t feature, int64_t example) const {
    return job_.grad + (feature * job_.examples + example) * job_.columns;
  }

  int64_t bag_size(int64_t bag) const { return job_.offsets[bag + 1] - job_.offsets[bag]; }

  double norm_of_few(int64_t example) const {
    const int64_t first = job_.offsets[example];
    const int64_t count = bag_size(example);
    if (count == 0) return 0.0;  // whatever the gradient is, finite or not
    const float* weights = job_.per_lookup ? job_.per_lookup + first : nullptr;
    const double norm = squared_norm(gradient(0, example), job_.columns);
    if (count == 1) return weights ? norm * static_cast<double>(*weights) * static_cast<double>(*weights) : norm;
    return norm * FewLookups(job_.indices + first, weights, count).sum_over_rows();
  }

  void collect(int64_t example) {
    int64_t count = 0;
    for (int64_t f = 0; f < job_.features; ++f) count += bag_size(f * job_.examples + example);
    if (slots_.size() < 2 * static_cast<size_t>(count)) grow(2 * static_cast<size_t>(count));
    lookups_.clear();
    for (int64_t f = 0; f < job_.features; ++f) {
      const int64_t bag = f * job_.examples + example;
      for (int64_t j = job_.offsets[bag]; j < job_.offsets[bag + 1]; ++j)
        add(job_.indices[j], f, job_.per_lookup ? static_cast<double>(job_.per_lookup[j]) : 1.0);
    }
  }

  // Slots are a power of two, at least twice the lookups, and all empty between examples.
  void grow(size_t least) {
    size_t size = 16;
    shift_ = 60;
    for (; size < least; size *= 2) --shift_;
    slots_.assign(size, kNone);
  }

  void add(int64_t row, int64_t feature, double weight) {
    constexpr uint64_t kGoldenRatio = 0x9E3779B97F4A7C15;
    size_t slot = (static_cast<uint64_t>(row) * kGoldenRatio) >> shift_;
    while (slots_[slot] != kNone && lookups_[slots_[slot]].row != row) slot = (slot + 1) & (slots_.size() - 1);
    const int64_t found = slots_[slot];
    if (found == kNone) {
      taken_.push_back(slot);
    } else if (lookups_[found].feature == feature) {
      lookups_[found].weight += weight;
      return;
    }
    slots_[slot] = static_cast<int64_t>(lookups_.size());
    lookups_.push_back({row, feature, found, weight});
  }

  double norm_of_feature(int64_t feature, int64_t example) {
    double& norm = of_feature_[feature];
    if (norm < 0.0) norm = squared_norm(gradient(feature, example), job_.columns);
    return norm;
  }

  // A row that several features share: their gradients add up first.
  double norm_of_row(int64_t last, int64_t example) {
    sum_.assign(job_.columns, 0.0);
    for (int64_t i = last; i != kNone; i = lookups_[i].earlier) {
      const float* grad = gradient(lookups_[i].feature, example);
      for (int64_t c = 0; c < job_.columns; ++c) sum_[c] += lookups_[i].weight * static_cast<double>(grad[c]);
    }
    double norm = 0.0;
    for (const double x : sum_) norm += x * x;
    return norm;
  }

  const BagSquaredNorms& job_;
  std::vector<Weighted> lookups_;
  std::vector<int64_t> slots_;  // index into lookups_ of a row's last entry
  std::vector<size_t> taken_;
  int shift_ = 64;
  std::vector<double> sum_;
  std::vector<double> of_feature_;
};

}  // namespace

void bag_squared_norms(std::span<const BagSquaredNorms> jobs, int64_t examples, float* out, const Parallel& parallel) {
  int64_t columns = 0;
  for (const BagSquaredNorms& job : jobs) columns += job.columns * job.features;
  parallel(0, examples, rows_per_task(columns), [&](int64_t begin, int64_t end) {
    std::vector<double> sums(end - begin);
    for (const BagSquaredNorms& job : jobs) {
      ExampleNorm norm(job);
      for (int64_t i = begin; i < end; ++i) sums[i - begin] += norm(i);
    }
    for (int64_t i = begin; i < end; ++i) out[i] = static_cast<float>(sums[i - begin]);
  });
}

namespace {

// ---- scatter ----

// The gradients that lookups send to their row, by their place in the grouping.
struct SentGradients {
  const ScatterAdd& job;

  LAZYDP_INLINE_MEMBER void fetch_ahead_of(int64_t) const {}
  LAZYDP_INLINE_MEMBER int64_t bag(int64_t i) const { return job.groups.bag[job.groups.order[i]]; }
  LAZYDP_INLINE_MEMBER const float* row(int64_t i) const { return job.grad + bag(i) * job.columns; }
  LAZYDP_INLINE_MEMBER float weight(int64_t i) const {
    const float scale = job.scale[bag(i)];
    return job.per_lookup ? scale * job.per_lookup[job.groups.order[i]] : scale;
  }
};

struct AddTo {
  float* out;
  float alpha;
  template <class Vector>
  LAZYDP_INLINE_MEMBER void operator()(int64_t column, const Vector& sum) const {
    *reinterpret_cast<Vector*>(out + column) += alpha * sum;
  }
};

LAZYDP_VECTOR_CLONES
void add_to_rows(const ScatterAdd& job, int64_t begin, int64_t end) {
  const Grouping& groups = job.groups;
  const SentGradients sent{job};
  for (int64_t u = begin; u < end; ++u) {
    const int64_t ahead = u + kPrefetchDistance;
    if (ahead < end) {
      prefetch_to_write(job.weight + groups.rows[ahead] * job.columns, job.columns);
      if (groups.starts[ahead] < groups.starts[ahead + 1]) prefetch_to_read(sent.row(groups.starts[ahead]), job.columns);
    }
    sum_rows(sent, groups.starts[u], groups.starts[u + 1], job.columns,
             AddTo{job.weight + groups.rows[u] * job.columns, job.alpha});
  }
}

}  // namespace

void scatter_add(std::span<const ScatterAdd> jobs, const Parallel& parallel) {
  JobRanges ranges(parallel);
  for (size_t j = 0; j < jobs.size(); ++j) ranges.add(j, jobs[j].groups.count, rows_per_task(jobs[j].columns));
  ranges.each([&](int64_t j, int64_t begin, int64_t end) { add_to_rows(jobs[j], begin, end); });
}

}  // namespace lazydp::cpu
