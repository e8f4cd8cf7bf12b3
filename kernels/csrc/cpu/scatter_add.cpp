// The clipped gradients of a batch, added to the rows that it read.
#include <memory>
#include <vector>

#include "cpu/bags.h"
#include "cpu/exact_rows.h"
#include "cpu/simd_level.h"
#include "cpu/sum_rows.h"
#include "cpu/vector_clones.h"

namespace lazydp::cpu {
namespace {

// The gradients that lookups send to their row, by their place in the grouping.
struct SentGradients {
  const ScatterAdd& job;

  LAZYDP_INLINE_MEMBER void fetch_ahead_of(int64_t) const {}
  LAZYDP_INLINE_MEMBER void fetch(int64_t i) const { prefetch_to_read(row(i), job.columns); }
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

// Asks for the memory of the row kPrefetchDistance ahead, and of the first of `terms` that goes there.
template <class Terms>
LAZYDP_INLINE void fetch_ahead(const ScatterAdd& job, const Terms& terms, int64_t u, int64_t end) {
  const int64_t ahead = u + kPrefetchDistance;
  if (ahead >= end) return;
  const Grouping& groups = job.groups;
  prefetch_to_write(job.weight + groups.rows[ahead] * job.columns, job.columns);
  if (groups.starts[ahead] < groups.starts[ahead + 1]) terms.fetch(groups.starts[ahead]);
}

LAZYDP_VECTOR_CLONES
void add_to_rows(const ScatterAdd& job, int64_t begin, int64_t end) {
  const Grouping& groups = job.groups;
  const SentGradients sent{job};
  for (int64_t u = begin; u < end; ++u) {
    fetch_ahead(job, sent, u, end);
    sum_rows(sent, groups.starts[u], groups.starts[u + 1], job.columns,
             AddTo{job.weight + groups.rows[u] * job.columns, static_cast<float>(job.alpha)});
  }
}

template <class Eight, class Terms>
LAZYDP_INLINE void add_terms_to_rows(const ScatterAdd& job, const Terms& terms, int64_t begin, int64_t end) {
  const Grouping& groups = job.groups;
  const SentGradients sent{job};
  for (int64_t u = begin; u < end; ++u) {
    fetch_ahead(job, terms, u, end);
    const int64_t first = groups.starts[u];
    const int64_t last = groups.starts[u + 1];
    float* const row = job.weight + groups.rows[u] * job.columns;
    if (last - first == 1 && is_plain_weight(sent.exact_weight(first))) {
      sum_rows(sent, first, last, job.columns, AddTo{row, static_cast<float>(job.alpha)});
    } else {
      add_exact_sum<Eight>(terms, first, last, job.columns, Grid{job.grid, job.alpha}, row);
    }
  }
}

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

// What an exact scatter forms before it adds: the terms of each bag, where all lookups of a bag send the same and are many.
struct FormedBags {
  uint64_t* in_grids = nullptr;  // [bags, columns]; null: each lookup forms its own
  int64_t length = 0;            // of every bag; 0: not equal
};

template <class Eight>
LAZYDP_INLINE void add_exactly(const ScatterAdd& job, const FormedBags& formed, int64_t begin, int64_t end) {
  if (!formed.in_grids) {
    const SentGradients sent{job};
    add_terms_to_rows<Eight>(job, FormedTerms<SentGradients>{sent}, begin, end);
  } else if (formed.length > 1) {
    const EqualBags bags{job.groups.order, ~uint64_t{0} / static_cast<uint64_t>(formed.length) + 1};
    add_terms_to_rows<Eight>(job, TermsOfBags<EqualBags>{formed.in_grids, job.columns, bags}, begin, end);
  } else {
    add_terms_to_rows<Eight>(job, TermsOfBags<GivenBags>{formed.in_grids, job.columns, {job.groups}}, begin, end);
  }
}

LAZYDP_VECTOR_CLONES
void add_exactly_to_rows(const ScatterAdd& job, const FormedBags& formed, int64_t begin, int64_t end) {
  add_exactly<EightDoubles>(job, formed, begin, end);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512dq"))) void add_exactly_to_rows_avx512(const ScatterAdd& job, const FormedBags& formed,
                                                                            int64_t begin, int64_t end) {
  add_exactly<EightDoublesDq>(job, formed, begin, end);
}
#endif

LAZYDP_VECTOR_CLONES
void form_terms_of_bags(const ScatterAdd& job, uint64_t* in_grids, int64_t begin, int64_t end) {
  const double shift = kShift * job.grid;
  const int64_t in_vectors = job.columns - job.columns % EightDoubles::kWidth;
  for (int64_t b = begin; b < end; ++b) {
    const float* const row = job.grad + b * job.columns;
    const auto weight = static_cast<double>(job.scale[b]);
    uint64_t* const out = in_grids + b * job.columns;
    form_terms<EightDoubles>(row, weight, shift, 0, in_vectors, out);
    form_terms<OneDouble>(row, weight, shift, in_vectors, job.columns, out);
  }
}

// Bags of fewer lookups do not repay it.
constexpr int64_t kLookupsPerFormedBag = 4;

bool is_formed_by_bag(const ScatterAdd& job) {
  return job.grid > 0.0 && !job.per_lookup && job.groups.starts[job.groups.count] >= kLookupsPerFormedBag * job.bags;
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

// FormedBags of every job.
class FormedJobs {
 public:
  FormedJobs(std::span<const ScatterAdd> jobs, const Parallel& parallel) : formed_(jobs.size()) {
    int64_t size = 0;
    for (const ScatterAdd& job : jobs) size += is_formed_by_bag(job) ? job.bags * job.columns : 0;
    terms_.reset(new uint64_t[size]);  // not set to 0: all of it is written
    uint64_t* next = terms_.get();
    JobRanges ranges(parallel);
    for (size_t j = 0; j < jobs.size(); ++j) {
      if (!is_formed_by_bag(jobs[j])) continue;
      formed_[j] = {next, length_of_bags(jobs[j])};
      next += jobs[j].bags * jobs[j].columns;
      ranges.add(j, jobs[j].bags, rows_per_task(jobs[j].columns));
    }
    ranges.each([&](int64_t j, int64_t begin, int64_t end) {
      form_terms_of_bags(jobs[j], formed_[j].in_grids, begin, end);
    });
  }

  const FormedBags& operator[](int64_t job) const { return formed_[job]; }

 private:
  std::unique_ptr<uint64_t[]> terms_;
  std::vector<FormedBags> formed_;
};

auto exact_scatter() {
#if defined(__x86_64__)
  if (simd_level() == SimdLevel::kAvx512) return add_exactly_to_rows_avx512;
#endif
  return add_exactly_to_rows;
}

}  // namespace

void scatter_add(std::span<const ScatterAdd> jobs, const Parallel& parallel) {
  const FormedJobs formed(jobs, parallel);
  const auto add_exactly_in_use = exact_scatter();
  JobRanges ranges(parallel);
  for (size_t j = 0; j < jobs.size(); ++j) ranges.add(j, jobs[j].groups.count, rows_per_task(jobs[j].columns));
  ranges.each([&](int64_t j, int64_t begin, int64_t end) {
    if (jobs[j].grid > 0.0) {
      add_exactly_in_use(jobs[j], formed[j], begin, end);
    } else {
      add_to_rows(jobs[j], begin, end);
    }
  });
}

}  // namespace lazydp::cpu
