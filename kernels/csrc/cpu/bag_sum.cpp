// Sums of bags of rows.
#include "cpu/bags.h"
#include "cpu/sum_rows.h"
#include "cpu/vector_clones.h"

namespace lazydp::cpu {
namespace {

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

}  // namespace lazydp::cpu
