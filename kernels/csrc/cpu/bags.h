// Rows of bags: grouping of equal rows, sums, norms, scatter. Raw pointers, no torch.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace lazydp::cpu {

// Lookups grouped by row. `rows` and `order` have room for `count`, `starts` for count + 1; returns the number of
// distinct rows. Stable: lookups of one row keep their order.
int64_t group_rows(const int64_t* indices, int64_t count, int64_t num_rows, int64_t* rows, int64_t* order, int64_t* starts,
                   const Parallel& parallel);

// The bag of every lookup, into out[offsets[bags]].
void bag_of_lookups(const int64_t* offsets, int64_t bags, int64_t* out, const Parallel& parallel);

// Lookups grouped by row, as group_rows leaves them, with the bag of each.
struct Grouping {
  const int64_t* rows;       // [count] distinct
  const int64_t* order;      // [lookups]
  const int64_t* starts;     // [count + 1]
  const int64_t* bag;        // [lookups]
  int64_t count;
};

struct BagSum {
  const float* weight;       // [num_rows, columns]
  const int64_t* indices;    // [count]
  const int64_t* offsets;    // [bags + 1]
  const float* per_lookup;   // [count], or null
  float* out;                // [bags, columns]
  int64_t bags;
  int64_t columns;
};
void bag_sum(const BagSum& job, const Parallel& parallel);

// The same in two parts: bags of one lookup, row by row (of group u, to every bag that holds nothing else), and all others.
int64_t single_bags(const BagSum& job);
void row_to_single_bags(const BagSum& job, const Grouping& groups, int64_t u);
void sum_other_bags(const BagSum& job, const Parallel& parallel);

struct BagSquaredNorms {
  const int64_t* indices;    // [count]
  const int64_t* offsets;    // [features * examples + 1], feature-major
  const float* per_lookup;   // [count], or null
  const float* grad;         // [features, examples, columns]
  float* out;                // [examples]
  int64_t features;
  int64_t examples;
  int64_t columns;
};
void bag_squared_norms(const BagSquaredNorms& job, const Parallel& parallel);

struct ScatterAdd {
  float* weight;             // [num_rows, columns]
  Grouping groups;
  const float* per_lookup;   // [count], or null
  const float* grad;         // [bags, columns]
  const float* scale;        // [bags]
  float alpha;
  int64_t columns;
};
void scatter_add(const ScatterAdd& job, const Parallel& parallel);

}  // namespace lazydp::cpu
