// Rows of bags: grouping of equal rows, sums, norms, scatter. Raw pointers, no torch. Each takes several jobs, one a table, and
// does them as one.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/parallel.h"

namespace lazydp::cpu {

// Rows below this many are not worth another thread.
inline int64_t rows_per_task(int64_t columns) {
  constexpr int64_t kFloatsPerTask = 16384;
  return 1 + kFloatsPerTask / (1 + columns);
}

// Lookups to be grouped by row. Stable: lookups of one row keep their order.
struct GroupRows {
  const int64_t* indices;  // [count], below num_rows
  int64_t count;
  int64_t num_rows;
  int64_t* rows;       // [groups] of room for count
  int64_t* order;      // [count]
  int64_t* starts;     // [groups + 1] of room for count + 1
  int64_t groups = 0;  // found: distinct rows
};
void group_rows(std::span<GroupRows> jobs, const Parallel& parallel);

// The bag of every lookup.
struct BagIds {
  const int64_t* offsets;  // [bags + 1]
  int64_t bags;
  int64_t* out;  // [offsets[bags]]
};
void bag_of_lookups(std::span<const BagIds> jobs, const Parallel& parallel);

// Lookups grouped by row, as group_rows leaves them, with the bag of each.
struct Grouping {
  const int64_t* rows;    // [count] distinct
  const int64_t* order;   // [lookups]
  const int64_t* starts;  // [count + 1]
  const int64_t* bag;     // [lookups]
  int64_t count;
};

struct BagSum {
  const float* weight;      // [num_rows, columns]
  const int64_t* indices;   // [count]
  const int64_t* offsets;   // [bags + 1]
  const float* per_lookup;  // [count], or null
  float* out;               // [bags, columns]
  int64_t bags;
  int64_t columns;
};
void bag_sum(std::span<const BagSum> jobs, const Parallel& parallel);

void sum_bags(const BagSum& job, int64_t begin, int64_t end);

// The same in two parts: bags of one lookup, by their rows, and all others.
int64_t single_bags(const BagSum& job);
// Where the row of each group [begin, end) goes as it is, into copies[begin, end): to the bag of its first lookup, or null.
void single_bags_of_rows(const BagSum& job, const Grouping& groups, int64_t begin, int64_t end, float** copies);
// What of groups [begin, end) goes to single bags beside those copies.
void rows_to_other_single_bags(const BagSum& job, const Grouping& groups, int64_t begin, int64_t end, float* const* copies);
void sum_bags_but_single(const BagSum& job, int64_t begin, int64_t end);

struct BagSquaredNorms {
  const int64_t* indices;   // [count]
  const int64_t* offsets;   // [features * examples + 1], feature-major
  const float* per_lookup;  // [count], or null
  const float* grad;        // [features, examples, columns]
  int64_t features;
  int64_t examples;
  int64_t columns;
};
// The sum over all jobs, into out[examples]; every job has as many. Never below the truth: what rounding may have taken away is
// added, and an example whose lookups cancel counts at least kCancelling times its largest term.
void bag_squared_norms(std::span<const BagSquaredNorms> jobs, int64_t examples, double* out, const Parallel& parallel);

struct ScatterAdd {
  float* weight;  // [num_rows, columns]
  Grouping groups;
  const float* per_lookup;  // [count], or null
  const float* grad;        // [bags, columns]
  const float* scale;       // [bags]
  double alpha;
  double grid;  // of exact sums (common/exact_sum.h), or 0: sums in float32
  int64_t columns;
  int64_t bags;
};
void scatter_add(std::span<const ScatterAdd> jobs, const Parallel& parallel);

}  // namespace lazydp::cpu
