#include "cpu/weighted_products.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/product_tiles.h"
#include "cpu/simd_level.h"
#include "cpu/vector_clones.h"
#include "cpu/weighted_products_amx.h"

namespace lazydp::cpu {
namespace {

constexpr int64_t kUnitsPerChunk = 2048;  // at least; the fewer chunks, the fewer passes over the sums
constexpr int64_t kPanelsPerTask = 4;     // of rows, which are read again for each panel of columns
constexpr int64_t kUnitsPerPackTask = 16;
constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, kAlignment); }
};
using Memory = std::unique_ptr<float[], Free>;

Memory memory_for(int64_t count) {
  return Memory(static_cast<float*>(::operator new[](static_cast<size_t>(count) * sizeof(float), kAlignment)));
}

int64_t ceil_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// [0, count) in `parts` parts of nearly equal size.
struct Parts {
  int64_t count;
  int64_t parts;
  int64_t begin(int64_t part) const { return part * count / parts; }
};

// The units of one chunk, packed by panels: of each panel all units, one after the other.
class Packed {
 public:
  Packed(const WeightedProduct& job, const ProductKernels& kernels, int64_t most_units)
      : job_(job),
        kernels_(kernels),
        // All panels as wide as the first; so the last one is not much narrower, where there are few.
        row_width_(ceil_of(job.outputs, ceil_of(job.outputs, kernels.tile_rows))),
        column_width_(kernels.panel_columns),
        rows_(memory_for(row_panels() * row_width_ * most_units)),
        columns_(memory_for(column_panels() * column_width_ * most_units)) {}

  void begin(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
  }

  void pack(int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t unit = job_.order ? job_.order[first_ + k] : first_ + k;
      kernels_.pack_scaled(job_.grads + unit * job_.outputs, job_.outputs, job_.scale[unit], row_width_, row_width_ * count_,
                           rows_.get() + k * row_width_);
      kernels_.pack_columns(job_.inputs + unit * job_.columns, job_.columns, column_width_ * count_,
                            columns_.get() + k * column_width_);
    }
  }

  int64_t row_panels() const { return ceil_of(job_.outputs, row_width_); }
  int64_t column_panels() const { return ceil_of(job_.columns, column_width_); }

  // Asks for the memory of a tile's sums.
  void fetch_ahead(int64_t row_panel, int64_t column_panel) const {
    constexpr int64_t kPerLine = 8;
    const int64_t row = row_panel * row_width_;
    const int64_t column = column_panel * column_width_;
    const int64_t last = std::min(column + column_width_, job_.columns);
    for (int64_t r = row; r < std::min(row + row_width_, job_.outputs); ++r)
      for (int64_t i = column; i < last; i += kPerLine) __builtin_prefetch(job_.out + r * job_.columns + i, 1);
  }

  void add_tile(int64_t row_panel, int64_t column_panel) const {
    const int64_t row = row_panel * row_width_;
    const int64_t column = column_panel * column_width_;
    kernels_.add_tile({rows_.get() + row * count_, columns_.get() + column * count_, row_width_,
                       std::min(row_width_, job_.outputs - row), std::min(column_width_, job_.columns - column), count_,
                       job_.block, job_.out + row * job_.columns + column, job_.columns, job_.overwrite && first_ == 0});
  }

 private:
  const WeightedProduct& job_;
  const ProductKernels& kernels_;
  int64_t row_width_;
  int64_t column_width_;
  Memory rows_;
  Memory columns_;
  int64_t first_ = 0;
  int64_t count_ = 0;
};

}  // namespace

void weighted_product(const WeightedProduct& job, const Parallel& parallel) {
  if (job.outputs == 0 || job.columns == 0) return;
  if (job.units == 0) {
    if (job.overwrite) std::fill_n(job.out, job.outputs * job.columns, 0.0);
    return;
  }
  if (simd_level() == SimdLevel::kAmx && job.block >= kLeastAmxBlock) return weighted_product_amx(job, parallel);
  const ProductKernels kernels = product_kernels();
  const int64_t chunk = ceil_of(kUnitsPerChunk, job.block) * job.block;
  Packed packed(job, kernels, std::min(chunk, job.units));
  const Parts groups{packed.row_panels(), ceil_of(packed.row_panels(), kPanelsPerTask)};
  for (int64_t first = 0; first < job.units; first += chunk) {
    const int64_t count = std::min(chunk, job.units - first);
    packed.begin(first, count);
    parallel(0, count, kUnitsPerPackTask, [&](int64_t begin, int64_t end) { packed.pack(begin, end); });
    parallel.each(groups.parts * packed.column_panels(), [&](int64_t task) {
      const int64_t group = task / packed.column_panels();
      for (int64_t p = groups.begin(group); p < groups.begin(group + 1); ++p) {
        if (p + 1 < groups.begin(group + 1)) packed.fetch_ahead(p + 1, task % packed.column_panels());
        packed.add_tile(p, task % packed.column_panels());
      }
    });
  }
}

namespace {

constexpr int64_t kColumnsPerTask = 128;

LAZYDP_VECTOR_CLONES
void add_columns(const WeightedSum& job, int64_t begin, int64_t end) {
  double sums[kColumnsPerTask];
  const int64_t width = end - begin;
  std::copy_n(job.out + begin, width, sums);
  for (int64_t k = 0; k < job.count; ++k) {
    const float* const row = job.rows + k * job.columns + begin;
    const double weight = job.weights[k];
    for (int64_t j = 0; j < width; ++j) sums[j] += weight * static_cast<double>(row[j]);
  }
  std::copy_n(sums, width, job.out + begin);
}

LAZYDP_VECTOR_CLONES
void round_noised(const NoisedSum& job, int64_t begin, int64_t end) {
  if (!job.noise) {
    for (int64_t i = begin; i < end; ++i) job.out[i] = static_cast<float>(job.sum[i]);
    return;
  }
  for (int64_t i = begin; i < end; ++i)
    job.out[i] = static_cast<float>(job.sum[i] + job.scale * static_cast<double>(job.noise[i]));
}

}  // namespace

void weighted_sum(const WeightedSum& job, const Parallel& parallel) {
  parallel.each(ceil_of(job.columns, kColumnsPerTask), [&](int64_t task) {
    const int64_t begin = task * kColumnsPerTask;
    add_columns(job, begin, std::min(begin + kColumnsPerTask, job.columns));
  });
}

void noised_sum(const NoisedSum& job, const Parallel& parallel) {
  constexpr int64_t kElementsPerTask = 16384;
  parallel(0, job.count, kElementsPerTask, [&](int64_t begin, int64_t end) { round_noised(job, begin, end); });
}

}  // namespace lazydp::cpu
