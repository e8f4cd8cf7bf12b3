// Ranges of rows that fill the lanes of the noise kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"

namespace lazydp::cpu {

// A range below this many normals is not worth another thread, nor the start of the lanes.
constexpr int64_t kNormalsPerTask = 32768;
// Ranges are handed out in multiples of the widest group of lanes, so that only the last group has idle lanes.
constexpr int64_t kRowsPerGroup = 16;

class RowRanges {
 public:
  explicit RowRanges(const Parallel& parallel) : groups_(parallel) {}

  void add(int64_t job, int64_t rows, int64_t columns) {
    counts_.resize(job + 1);
    counts_[job] = rows;
    groups_.add(job, (rows + kRowsPerGroup - 1) / kRowsPerGroup, 1 + kNormalsPerTask / (1 + kRowsPerGroup * columns));
  }

  // Calls f(job, begin, end) on ranges of the rows of every job, each a multiple of kRowsPerGroup long but for the last.
  template <class F>
  void each(const F& f) const {
    groups_.each([&](int64_t job, int64_t begin, int64_t end) {
      f(job, begin * kRowsPerGroup, std::min(end * kRowsPerGroup, counts_[job]));
    });
  }

 private:
  JobRanges groups_;
  std::vector<int64_t> counts_;
};

}  // namespace lazydp::cpu
