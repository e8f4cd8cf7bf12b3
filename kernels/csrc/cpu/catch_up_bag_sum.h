// Catch-up and the sums of bags in one pass over the rows, where that saves one.
#pragma once

#include "cpu/bags.h"
#include "cpu/noise.h"

namespace lazydp::cpu {

// Wakes the rows of `groups`, then sums the bags of `sum`, whose lookups they group.
void catch_up_bag_sum(const Wake& wake, const BagSum& sum, const Grouping& groups, const Parallel& parallel);

}  // namespace lazydp::cpu
