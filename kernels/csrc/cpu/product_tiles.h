// The inner loops of weighted products, for each instruction set. All of them give the same bits.
#pragma once

#include <cstdint>

namespace lazydp::cpu {

// One tile of the result: a panel of at most kMaxTileRows outputs against one of at most `panel_columns` inputs.
struct ProductTile {
  const float* rows;     // packed, [units, row_width]
  const float* columns;  // packed, [units, panel_columns], zeros beyond num_columns
  int64_t row_width;
  int64_t num_rows;
  int64_t num_columns;
  int64_t units;
  int64_t block;
  double* out;  // [num_rows, stride], of which num_columns are written
  int64_t stride;
  bool overwrite;  // what is in `out`, instead of adding to it
};

struct ProductKernels {
  int64_t tile_rows;      // at most, of a tile
  int64_t panel_columns;  // of a panel of columns
  void (*add_tile)(const ProductTile& tile);
  // Packs scale values, [count], panel by panel of `width` at most: panel p begins at out + p stride. A product below the least
  // normal float32 becomes 0: rounding it could double it.
  void (*pack_scaled)(const float* values, int64_t count, float scale, int64_t width, int64_t stride, float* out);
  // Packs values, [count], panel by panel of panel_columns, with zeros after the last.
  void (*pack_columns)(const float* values, int64_t count, int64_t stride, float* out);
};

ProductKernels portable_products();
#if defined(__x86_64__)
ProductKernels avx2_products();
ProductKernels avx512_products();
#endif
ProductKernels product_kernels();

}  // namespace lazydp::cpu
