#include "cpu/product_norms.h"

#include <algorithm>

#include "cpu/vector_clones.h"

namespace lazydp::cpu {
namespace {

constexpr int64_t kUnitsPerTask = 16;
constexpr int64_t kSums = 32;
constexpr double kUnit = 0x1p-53;  // what a float64 operation rounds, relative

LAZYDP_VECTOR_CLONES
double sum_of_squares(const float* values, int64_t count) {
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) {
      const double value = static_cast<double>(values[i + j]);
      sums[j] += value * value;
    }
  for (int64_t j = 0; i + j < count; ++j) {
    const double value = static_cast<double>(values[i + j]);
    sums[j] += value * value;
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

// At most this many terms are added one after the other to one number; the additions and products after it are within twice that.
double slack(const LayerPair& layer) {
  return 1.0 + 2.0 * kUnit * static_cast<double>(layer.columns + layer.outputs + 16);
}

void add_units(const ProductNorms& job, int64_t begin, int64_t end) {
  const double of_layers = 1.0 + 2.0 * kUnit * static_cast<double>(2 * job.layers.size());
  std::fill(job.out + begin, job.out + end, 0.0);
  for (const LayerPair& layer : job.layers)
    for (int64_t k = begin; k < end; ++k) {
      const double of_grads = sum_of_squares(layer.grads + k * layer.outputs, layer.outputs);
      const double of_inputs = layer.weight ? sum_of_squares(layer.inputs + k * layer.columns, layer.columns) : 0.0;
      job.out[k] += of_grads * (of_inputs + (layer.bias ? 1.0 : 0.0)) * slack(layer);
    }
  for (int64_t k = begin; k < end; ++k) job.out[k] *= of_layers;
}

}  // namespace

void product_norms(const ProductNorms& job, const Parallel& parallel) {
  parallel(0, job.units, kUnitsPerTask, [&](int64_t begin, int64_t end) { add_units(job, begin, end); });
}

}  // namespace lazydp::cpu
