// The noise kernels in plain C++, element by element from the common headers: what a machine without AVX2 runs, what
// the vector levels must equal bit for bit, and the same logic that CUDA compiles.
#include <algorithm>

#include "common/gaussian.h"
#include "common/skip_ahead.h"
#include "cpu/simd_level.h"

namespace lazydp::cpu {
namespace {

void draw(const Key& key, uint32_t counter, const Address& address, Distribution distribution, float z[kNormalsPerBlock]) {
  if (distribution == Distribution::kOnes) {
    std::fill_n(z, kNormalsPerBlock, 1.0f);
    return;
  }
  uint32_t words[kBlockWords];
  chacha20_block(key, counter, address, words);
  normals_of_block(words, z);
}

void catch_up_row(const CatchUp& job, int64_t row, int64_t from) {
  const Address address = noise_address(job.table, job.first_row + row, static_cast<uint32_t>(job.step));
  float* weight = job.weight + row * job.columns;
  float* momentum = job.momentum ? job.momentum + row * job.columns : nullptr;
  float z1[kNormalsPerBlock];
  float z2[kNormalsPerBlock];
  for (int64_t first = 0; first < job.columns; first += kNormalsPerBlock) {
    const auto counter = static_cast<uint32_t>(first / kNormalsPerBlock);
    const int64_t width = std::min<int64_t>(kNormalsPerBlock, job.columns - first);
    draw(job.key, counter, address, job.distribution, z1);
    if (momentum) draw(job.key, kSecondNormal + counter, address, job.distribution, z2);
    for (int64_t j = first; j < first + width; ++j) {
      if (momentum) {
        catch_up_with_momentum(weight[j], momentum[j], job.transition + 4 * from, job.factor + 3 * from, z1[j - first],
                               z2[j - first]);
      } else {
        weight[j] = catch_up(weight[j], job.transition[from], job.factor[from], z1[j - first]);
      }
    }
  }
}

void catch_up_positions(const CatchUp& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = job.row(i);
    const int32_t from = job.last[row];
    if (from != job.step) catch_up_row(job, row, from);
    job.last[row] = job.step;
    if (job.copies && job.copies[i]) std::copy_n(job.weight + row * job.columns, job.columns, job.copies[i]);
  }
}

void fill(const Fill& job, int64_t segments, int64_t begin, int64_t end) {
  const int64_t blocks = (job.columns + kNormalsPerBlock - 1) / kNormalsPerBlock;
  const int64_t segment_blocks = (blocks + segments - 1) / segments;
  float z[kNormalsPerBlock];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / segments;
    const Address address = noise_address(job.table, job.first_row + row, job.step);
    const int64_t first = i % segments * segment_blocks;
    for (int64_t block = first; block < std::min(first + segment_blocks, blocks); ++block) {
      const int64_t column = block * kNormalsPerBlock;
      draw(job.key, static_cast<uint32_t>(block), address, Distribution::kGaussian, z);
      std::copy_n(z, std::min<int64_t>(kNormalsPerBlock, job.columns - column), job.out + row * job.columns + column);
    }
  }
}

void blocks_of_inputs(const uint32_t* inputs, int64_t blocks, uint32_t* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const uint32_t* in = inputs + b * kBlockWords;
    Key key;
    std::copy_n(in + 4, kKeyWords, key.words);
    chacha20_block(key, in[12], {in[13], in[14], in[15]}, out + b * kBlockWords);
  }
}

void normals_of_blocks(const uint32_t* words, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b) normals_of_block(words + b * kBlockWords, out + b * kNormalsPerBlock);
}

}  // namespace

NoiseKernels portable_kernels() { return {fill, catch_up_positions, blocks_of_inputs, normals_of_blocks}; }

}  // namespace lazydp::cpu
