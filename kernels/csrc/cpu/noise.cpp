#include "cpu/noise.h"

#include <algorithm>

#include "common/gaussian.h"
#include "cpu/row_ranges.h"
#include "cpu/simd_level.h"

namespace lazydp::cpu {
namespace {

// A draw of few but long rows is cut into segments of whole blocks, so that every lane of every thread has one.
int64_t segments_per_row(int64_t rows, int64_t columns, int threads) {
  const int64_t blocks = (columns + kNormalsPerBlock - 1) / kNormalsPerBlock;
  const int64_t lanes = kRowsPerGroup * threads;
  if (rows == 0 || rows >= 4 * lanes) return 1;
  const int64_t segments = std::max<int64_t>(1, std::min((4 * lanes + rows - 1) / rows, blocks / 4));
  const int64_t segment_blocks = (blocks + segments - 1) / segments;
  return std::max<int64_t>(1, (blocks + segment_blocks - 1) / segment_blocks);
}

}  // namespace

void fill_normals(const Fill& job, const Parallel& parallel) {
  if (job.rows == 0 || job.columns == 0) return;
  const NoiseKernels kernels = noise_kernels();
  const int64_t segments = segments_per_row(job.rows, job.columns, parallel.threads);
  RowRanges ranges(parallel);
  ranges.add(0, job.rows * segments, job.columns / segments);
  ranges.each([&](int64_t, int64_t begin, int64_t end) { kernels.fill(job, segments, begin, end); });
}

void catch_up_rows(std::span<const CatchUp> jobs, const Parallel& parallel) {
  const NoiseKernels kernels = noise_kernels();
  RowRanges ranges(parallel);
  for (size_t j = 0; j < jobs.size(); ++j) ranges.add(j, jobs[j].count, jobs[j].columns);
  ranges.each([&](int64_t j, int64_t begin, int64_t end) { kernels.catch_up(jobs[j], begin, end); });
}

void keystream(const Key& key, uint64_t stream, uint32_t counter, uint32_t* out, int64_t count, const Parallel& parallel) {
  const Address address = keystream_address(stream);
  const int64_t blocks = (count + kBlockWords - 1) / kBlockWords;
  parallel(0, blocks, 256, [&](int64_t begin, int64_t end) {
    uint32_t words[kBlockWords];
    for (int64_t b = begin; b < end; ++b) {
      chacha20_block(key, counter + static_cast<uint32_t>(b), address, words);
      std::copy_n(words, std::min<int64_t>(kBlockWords, count - b * kBlockWords), out + b * kBlockWords);
    }
  });
}

}  // namespace lazydp::cpu
