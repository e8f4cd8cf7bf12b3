#include "cpu/noise.h"

#include <algorithm>
#include <cstring>

#include "common/gaussian.h"
#include "common/skip_ahead.h"

namespace lazydp::cpu {
namespace {

// Counters of the second normal of an element (dimension 2) start here.
constexpr uint32_t kSecondNormal = 0x80000000u;

void draw(const Key& key, uint32_t counter, const Address& address, Law law, float z[kNormalsPerBlock]) {
  if (law == Law::kOnes) {
    std::fill_n(z, kNormalsPerBlock, 1.0f);
    return;
  }
  uint32_t words[kBlockWords];
  chacha20_block(key, counter, address, words);
  normals_of_block(words, z);
}

void wake_row(const Wake& job, int64_t row, int32_t from) {
  const Address address = noise_address(job.table, row, static_cast<uint32_t>(job.step));
  float* weight = job.weight + row * job.columns;
  float* momentum = job.momentum ? job.momentum + row * job.columns : nullptr;
  float z1[kNormalsPerBlock];
  float z2[kNormalsPerBlock];
  for (int64_t first = 0; first < job.columns; first += kNormalsPerBlock) {
    const auto counter = static_cast<uint32_t>(first / kNormalsPerBlock);
    const int64_t width = std::min<int64_t>(kNormalsPerBlock, job.columns - first);
    draw(job.key, counter, address, job.law, z1);
    if (!momentum) {
      for (int64_t j = 0; j < width; ++j)
        weight[first + j] = wake(weight[first + j], job.transition[from], job.factor[from], z1[j]);
      continue;
    }
    draw(job.key, kSecondNormal + counter, address, job.law, z2);
    for (int64_t j = 0; j < width; ++j)
      wake_with_momentum(weight[first + j], momentum[first + j], job.transition + 4 * from, job.factor + 3 * from, z1[j], z2[j]);
  }
}

}  // namespace

void fill_normals(const Fill& job, const Parallel& parallel) {
  parallel(0, job.rows, 1 + 4096 / (1 + job.columns), [&](int64_t begin, int64_t end) {
    float z[kNormalsPerBlock];
    for (int64_t r = begin; r < end; ++r) {
      const Address address = noise_address(job.table, job.first_row + r, job.step);
      for (int64_t first = 0; first < job.columns; first += kNormalsPerBlock) {
        draw(job.key, static_cast<uint32_t>(first / kNormalsPerBlock), address, Law::kGaussian, z);
        std::copy_n(z, std::min<int64_t>(kNormalsPerBlock, job.columns - first), job.out + r * job.columns + first);
      }
    }
  });
}

void wake_rows(const Wake& job, const Parallel& parallel) {
  parallel(0, job.count, 1 + 4096 / (1 + job.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = job.row(i);
      const int32_t from = job.last[row];
      if (from == job.step) continue;
      wake_row(job, row, from);
      job.last[row] = job.step;
    }
  });
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
