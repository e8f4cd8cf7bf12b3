// The clipped gradients of a batch, added to the rows that it read.
#include "cpu/bags.h"
#include "cpu/exact_rows.h"
#include "cpu/sum_rows.h"
#include "cpu/vector_clones.h"

namespace lazydp::cpu {
namespace {

// The gradients that lookups send to their row, by their place in the grouping.
struct SentGradients {
  const ScatterAdd& job;

  LAZYDP_INLINE_MEMBER void fetch_ahead_of(int64_t) const {}
  LAZYDP_INLINE_MEMBER int64_t bag(int64_t i) const { return job.groups.bag[job.groups.order[i]]; }
  LAZYDP_INLINE_MEMBER const float* row(int64_t i) const { return job.grad + bag(i) * job.columns; }
  LAZYDP_INLINE_MEMBER float weight(int64_t i) const { return static_cast<float>(exact_weight(i)); }
  LAZYDP_INLINE_MEMBER double exact_weight(int64_t i) const {
    const auto scale = static_cast<double>(job.scale[bag(i)]);
    return job.per_lookup ? scale * static_cast<double>(job.per_lookup[job.groups.order[i]]) : scale;
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

// Asks for the memory of the row kPrefetchDistance ahead, and of the first gradient that goes there.
LAZYDP_INLINE void fetch_ahead(const ScatterAdd& job, int64_t u, int64_t end) {
  const int64_t ahead = u + kPrefetchDistance;
  if (ahead >= end) return;
  const Grouping& groups = job.groups;
  prefetch_to_write(job.weight + groups.rows[ahead] * job.columns, job.columns);
  if (groups.starts[ahead] < groups.starts[ahead + 1])
    prefetch_to_read(SentGradients{job}.row(groups.starts[ahead]), job.columns);
}

LAZYDP_VECTOR_CLONES
void add_to_rows(const ScatterAdd& job, int64_t begin, int64_t end) {
  const Grouping& groups = job.groups;
  for (int64_t u = begin; u < end; ++u) {
    fetch_ahead(job, u, end);
    sum_rows(SentGradients{job}, groups.starts[u], groups.starts[u + 1], job.columns,
             AddTo{job.weight + groups.rows[u] * job.columns, static_cast<float>(job.alpha)});
  }
}

LAZYDP_VECTOR_CLONES
void add_exactly_to_rows(const ScatterAdd& job, int64_t begin, int64_t end) {
  const Grouping& groups = job.groups;
  for (int64_t u = begin; u < end; ++u) {
    fetch_ahead(job, u, end);
    const SentGradients sent{job};
    const int64_t first = groups.starts[u];
    const int64_t last = groups.starts[u + 1];
    float* const row = job.weight + groups.rows[u] * job.columns;
    if (last - first == 1 && is_plain_weight(sent.exact_weight(first))) {
      sum_rows(sent, first, last, job.columns, AddTo{row, static_cast<float>(job.alpha)});
    } else {
      add_exact_sum(sent, first, last, job.columns, Grid{job.grid, job.alpha}, row);
    }
  }
}

}  // namespace

void scatter_add(std::span<const ScatterAdd> jobs, const Parallel& parallel) {
  JobRanges ranges(parallel);
  for (size_t j = 0; j < jobs.size(); ++j) ranges.add(j, jobs[j].groups.count, rows_per_task(jobs[j].columns));
  ranges.each([&](int64_t j, int64_t begin, int64_t end) {
    (jobs[j].grid > 0.0 ? add_exactly_to_rows : add_to_rows)(jobs[j], begin, end);
  });
}

}  // namespace lazydp::cpu
