#include "cpu/bags.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

namespace lazydp::cpu {
namespace {

int64_t grain(int64_t columns) { return 1 + 8192 / (1 + columns); }

}  // namespace

int64_t group_rows(const int64_t* indices, int64_t count, int64_t num_rows, int64_t* rows, int64_t* order, int64_t* starts,
                   const Parallel&) {
  constexpr int kDigitBits = 11;
  constexpr int64_t kDigits = int64_t{1} << kDigitBits;
  std::vector<int64_t> other(count);
  std::iota(order, order + count, int64_t{0});
  int64_t* from = order;
  int64_t* to = other.data();
  for (int shift = 0; shift < 63 && (num_rows - 1) >> shift > 0; shift += kDigitBits) {
    int64_t places[kDigits + 1] = {};
    for (int64_t i = 0; i < count; ++i) ++places[1 + ((indices[i] >> shift) & (kDigits - 1))];
    for (int64_t d = 0; d < kDigits; ++d) places[d + 1] += places[d];
    for (int64_t i = 0; i < count; ++i) to[places[(indices[from[i]] >> shift) & (kDigits - 1)]++] = from[i];
    std::swap(from, to);
  }
  if (from != order) std::copy(from, from + count, order);

  int64_t groups = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = indices[order[i]];
    if (groups > 0 && rows[groups - 1] == row) continue;
    rows[groups] = row;
    starts[groups++] = i;
  }
  starts[groups] = count;
  return groups;
}

void bag_sum(const BagSum& job, const Parallel& parallel) {
  parallel(0, job.bags, grain(job.columns), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      float* out = job.out + g * job.columns;
      std::fill_n(out, job.columns, 0.0f);
      for (int64_t i = job.offsets[g]; i < job.offsets[g + 1]; ++i) {
        const float* row = job.weight + job.indices[i] * job.columns;
        const float w = job.per_lookup ? job.per_lookup[i] : 1.0f;
        for (int64_t c = 0; c < job.columns; ++c) out[c] += w * row[c];
      }
    }
  });
}

void bag_squared_norms(const BagSquaredNorms& job, const Parallel& parallel) {
  parallel(0, job.examples, grain(job.columns * job.features), [&](int64_t begin, int64_t end) {
    struct Lookup {
      int64_t row;
      int64_t feature;
      double weight;
    };
    std::vector<Lookup> lookups;
    std::vector<double> sum(job.columns);
    for (int64_t i = begin; i < end; ++i) {
      lookups.clear();
      for (int64_t f = 0; f < job.features; ++f)
        for (int64_t j = job.offsets[f * job.examples + i]; j < job.offsets[f * job.examples + i + 1]; ++j)
          lookups.push_back({job.indices[j], f, job.per_lookup ? job.per_lookup[j] : 1.0});
      std::stable_sort(lookups.begin(), lookups.end(), [](const Lookup& a, const Lookup& b) { return a.row < b.row; });
      double norm = 0.0;
      for (size_t from = 0; from < lookups.size();) {
        size_t to = from;
        std::fill(sum.begin(), sum.end(), 0.0);
        for (; to < lookups.size() && lookups[to].row == lookups[from].row; ++to) {
          const float* grad = job.grad + (lookups[to].feature * job.examples + i) * job.columns;
          for (int64_t c = 0; c < job.columns; ++c) sum[c] += lookups[to].weight * grad[c];
        }
        for (int64_t c = 0; c < job.columns; ++c) norm += sum[c] * sum[c];
        from = to;
      }
      job.out[i] = static_cast<float>(norm);
    }
  });
}

void scatter_add(const ScatterAdd& job, const Parallel& parallel) {
  parallel(0, job.groups, grain(job.columns), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(job.columns);
    for (int64_t u = begin; u < end; ++u) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t i = job.starts[u]; i < job.starts[u + 1]; ++i) {
        const int64_t lookup = job.order[i];
        const int64_t g = job.bag[lookup];
        const float w = job.per_lookup ? job.scale[g] * job.per_lookup[lookup] : job.scale[g];
        const float* grad = job.grad + g * job.columns;
        for (int64_t c = 0; c < job.columns; ++c) sum[c] += w * grad[c];
      }
      float* row = job.weight + job.rows[u] * job.columns;
      for (int64_t c = 0; c < job.columns; ++c) row[c] += job.alpha * sum[c];
    }
  });
}

}  // namespace lazydp::cpu
