// Catch-up and the sums of bags in one pass over the rows, where that saves one.
#pragma once

#include <span>

#include "cpu/bags.h"
#include "cpu/noise.h"

namespace lazydp::cpu {

struct CatchUpBagSum {
  CatchUp catch_up;  // of the rows of `groups`
  BagSum sum;        // of the same table
  Grouping groups;   // of the lookups of `sum`
};

// Catches up the rows of every job, then sums its bags.
void catch_up_bag_sum(std::span<const CatchUpBagSum> jobs, const Parallel& parallel);

}  // namespace lazydp::cpu
