// Ranges of rows that fill the lanes of the noise kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"

namespace lazydp::cpu {

// A range below this many normals is not worth another thread.
constexpr int64_t kNormalsPerTask = 16384;
// Ranges are handed out in multiples of the widest group of lanes, so that only the last group has idle lanes.
constexpr int64_t kRowsPerGroup = 16;

// Calls f on ranges of [0, count), each a multiple of kRowsPerGroup long but for the last.
template <class F>
void in_groups(const Parallel& parallel, int64_t count, int64_t columns, const F& f) {
  const int64_t groups = (count + kRowsPerGroup - 1) / kRowsPerGroup;
  const int64_t grain = 1 + kNormalsPerTask / (1 + kRowsPerGroup * columns);
  parallel(0, groups, grain, [&](int64_t begin, int64_t end) {
    f(begin * kRowsPerGroup, std::min(end * kRowsPerGroup, count));
  });
}

}  // namespace lazydp::cpu
