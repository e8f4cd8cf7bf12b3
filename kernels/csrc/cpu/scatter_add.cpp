// The clipped gradients of a batch, added to the rows that it read.
#include <vector>

#include "cpu/bags.h"
#include "cpu/exact_rows.h"
#include "cpu/simd_level.h"
#include "cpu/sum_rows.h"
#include "cpu/vector_clones.h"

namespace lazydp::cpu {
namespace {

// The bag of a lookup, by its place in the grouping: as the caller gave it, or, where all bags are of one length, its quotient.
// (A random read less for each lookup.)
struct GivenBags {
  const Grouping& groups;
  LAZYDP_INLINE_MEMBER int64_t operator()(int64_t i) const { return groups.bag[groups.order[i]]; }
};

struct EqualBags {
  const int64_t* order;
  uint64_t inverse;  // of the length, times 2^64, rounded up: exact for fewer than 2^32 lookups (Lemire, arXiv 1902.01961)
  LAZYDP_INLINE_MEMBER int64_t operator()(int64_t i) const {
    return static_cast<int64_t>((static_cast<unsigned __int128>(inverse) * static_cast<uint64_t>(order[i])) >> 64);
  }
};

// The gradients that lookups send to their row, by their place in the grouping.
template <class Bags, bool kWeighted>
struct SentGradients {
  // Of two floats, in float64.
  static constexpr bool kExactProducts = !kWeighted;

  const ScatterAdd& job;
  Bags bag;

  LAZYDP_INLINE_MEMBER void fetch_ahead_of(int64_t) const {}
  LAZYDP_INLINE_MEMBER const float* row(int64_t i) const { return job.grad + bag(i) * job.columns; }
  LAZYDP_INLINE_MEMBER float weight(int64_t i) const { return static_cast<float>(exact_weight(i)); }
  LAZYDP_INLINE_MEMBER double exact_weight(int64_t i) const {
    const auto scale = static_cast<double>(job.scale[bag(i)]);
    return kWeighted ? scale * static_cast<double>(job.per_lookup[job.groups.order[i]]) : scale;
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

// Rows [begin, end). In float32, or exactly, by vectors of `Eight`.
template <class Eight, class Sent>
LAZYDP_INLINE void add_sent(const ScatterAdd& job, const Sent& sent, int64_t begin, int64_t end) {
  const Grouping& groups = job.groups;
  for (int64_t u = begin; u < end; ++u) {
    if (const int64_t ahead = u + kPrefetchDistance; ahead < end) {
      prefetch_to_write(job.weight + groups.rows[ahead] * job.columns, job.columns);
      if (groups.starts[ahead] < groups.starts[ahead + 1]) prefetch_to_read(sent.row(groups.starts[ahead]), job.columns);
    }
    const int64_t first = groups.starts[u];
    const int64_t last = groups.starts[u + 1];
    float* const row = job.weight + groups.rows[u] * job.columns;
    if (job.grid == 0.0 || (last - first == 1 && is_plain_weight(sent.exact_weight(first)))) {
      sum_rows(sent, first, last, job.columns, AddTo{row, static_cast<float>(job.alpha)});
    } else {
      add_exact_sum<Eight>(sent, first, last, job.columns, Grid{job.grid, job.alpha}, row);
    }
  }
}

// The length of every bag, or 0 where they differ. Ids never decrease, so that the first and last of each bag say it all.
int64_t length_of_bags(const ScatterAdd& job) {
  const int64_t lookups = job.groups.starts[job.groups.count];
  const int64_t length = job.bags > 0 ? lookups / job.bags : 0;
  if (length == 0 || length * job.bags != lookups || lookups >= int64_t{1} << 32) return 0;
  for (int64_t b = 0; b < job.bags; ++b)
    if (job.groups.bag[b * length] != b || job.groups.bag[(b + 1) * length - 1] != b) return 0;
  return length;
}

// `length` of every bag, or 0.
template <class Eight>
LAZYDP_INLINE void add_rows(const ScatterAdd& job, int64_t length, int64_t begin, int64_t end) {
  if (job.per_lookup) {
    add_sent<Eight>(job, SentGradients<GivenBags, true>{job, {job.groups}}, begin, end);
  } else if (length > 1) {
    const EqualBags bags{job.groups.order, ~uint64_t{0} / static_cast<uint64_t>(length) + 1};
    add_sent<Eight>(job, SentGradients<EqualBags, false>{job, bags}, begin, end);
  } else {
    add_sent<Eight>(job, SentGradients<GivenBags, false>{job, {job.groups}}, begin, end);
  }
}

LAZYDP_VECTOR_CLONES
void add_to_rows(const ScatterAdd& job, int64_t length, int64_t begin, int64_t end) {
  add_rows<EightDoubles>(job, length, begin, end);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512dq"))) void add_to_rows_avx512(const ScatterAdd& job, int64_t length, int64_t begin,
                                                                    int64_t end) {
  add_rows<EightDoublesDq>(job, length, begin, end);
}
#endif

auto scatter_in_use() {
#if defined(__x86_64__)
  if (simd_level() >= SimdLevel::kAvx512) return add_to_rows_avx512;
#endif
  return add_to_rows;
}

}  // namespace

void scatter_add(std::span<const ScatterAdd> jobs, const Parallel& parallel) {
  const auto add = scatter_in_use();
  std::vector<int64_t> lengths;
  JobRanges ranges(parallel);
  for (size_t j = 0; j < jobs.size(); ++j) {
    lengths.push_back(length_of_bags(jobs[j]));
    ranges.add(j, jobs[j].groups.count, rows_per_task(jobs[j].columns));
  }
  ranges.each([&](int64_t j, int64_t begin, int64_t end) { add(jobs[j], lengths[j], begin, end); });
}

}  // namespace lazydp::cpu
