// Squared norms of what single examples send to the tables.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "common/exact_sum.h"
#include "cpu/bags.h"
#include "cpu/vector_clones.h"

namespace lazydp::cpu {
namespace {

constexpr double kDoubleEpsilon = 0x1p-52;

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

LAZYDP_VECTOR_CLONES
float largest_of(const float* x, int64_t columns) {
  float largest = 0.0f;
  for (int64_t c = 0; c < columns; ++c) largest = std::max(largest, std::abs(x[c]));
  return largest;
}

bool has_negative(const float* weights, int64_t count) {
  return std::any_of(weights, weights + count, [](float weight) { return !(weight >= 0.0f); });
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
    if (is_short_sum(example)) return norm_of_few(example);
    return with_cancelling(norm_of_many(example), example);
  }

 private:
  static constexpr int64_t kNone = -1;

  // One bag of few lookups, all of one sign: nothing cancels.
  bool is_short_sum(int64_t example) const {
    if (job_.features != 1 || bag_size(example) > FewLookups::kMost) return false;
    return !job_.per_lookup || !has_negative(job_.per_lookup + job_.offsets[example], bag_size(example));
  }

  // The norm of what is really summed is never above this: what float64 may have rounded away is added, and what is left where
  // large terms cancel is at least kCancelling times the largest of them.
  double with_cancelling(double squared, int64_t example) {
    double absolute = 0.0;
    double largest = 0.0;
    int64_t lookups = 0;
    for (int64_t f = 0; f < job_.features; ++f) {
      const int64_t bag = f * job_.examples + example;
      if (bag_size(bag) == 0) continue;
      double weights = 0.0;
      double heaviest = 0.0;
      for (int64_t j = job_.offsets[bag]; j < job_.offsets[bag + 1]; ++j) {
        const double weight = job_.per_lookup ? std::abs(static_cast<double>(job_.per_lookup[j])) : 1.0;
        weights += weight;
        heaviest = std::max(heaviest, weight);
      }
      lookups += bag_size(bag);
      absolute += weights * std::sqrt(norm_of_feature(f, example));
      largest = std::max(largest, heaviest * static_cast<double>(largest_of(gradient(f, example), job_.columns)));
    }
    const double rounding = static_cast<double>(lookups + job_.columns) * kDoubleEpsilon * absolute;
    const double norm = std::sqrt(squared) + rounding;
    // In this order a norm that is not a number stays one.
    return norm < kCancelling * largest ? kCancelling * largest * kCancelling * largest : norm * norm;
  }

  double norm_of_many(int64_t example) {
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

void bag_squared_norms(std::span<const BagSquaredNorms> jobs, int64_t examples, double* out, const Parallel& parallel) {
  int64_t columns = 0;
  for (const BagSquaredNorms& job : jobs) columns += job.columns * job.features;
  parallel(0, examples, rows_per_task(columns), [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0);
    for (const BagSquaredNorms& job : jobs) {
      ExampleNorm norm(job);
      for (int64_t i = begin; i < end; ++i) out[i] += norm(i);
    }
  });
}

}  // namespace lazydp::cpu
