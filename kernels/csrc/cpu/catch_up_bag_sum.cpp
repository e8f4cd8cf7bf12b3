#include "cpu/catch_up_bag_sum.h"

#include <algorithm>

#include "cpu/row_ranges.h"
#include "cpu/simd_level.h"

namespace lazydp::cpu {
namespace {

constexpr int64_t kFloatsAtOnce = 32 * 1024;  // of rows, so few that the second cache holds them until they are handed on

// A row that has just woken goes to the bags that read nothing else; the other bags find it later.
void wake_and_hand_on(const Wake& wake, const BagSum& sum, const Grouping& groups, const Parallel& parallel) {
  const NoiseKernels kernels = noise_kernels();
  const int64_t at_once = kRowsPerGroup * (1 + kFloatsAtOnce / (1 + kRowsPerGroup * wake.columns));
  in_groups(parallel, wake.count, wake.columns, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t after = std::min(first + at_once, end);
      kernels.wake(wake, first, after);
      for (int64_t u = first; u < after; ++u) row_to_single_bags(sum, groups, u);
    }
  });
}

}  // namespace

void catch_up_bag_sum(const Wake& wake, const BagSum& sum, const Grouping& groups, const Parallel& parallel) {
  const int64_t single = single_bags(sum);
  if (2 * single < sum.bags) {
    wake_rows(wake, parallel);
    bag_sum(sum, parallel);
    return;
  }
  wake_and_hand_on(wake, sum, groups, parallel);
  if (single < sum.bags) sum_other_bags(sum, parallel);
}

}  // namespace lazydp::cpu
