// A draw of normals, as both devices take it.
#pragma once

#include <cstdint>

#include "common/chacha20.h"

namespace lazydp {

// A draw of `columns` normals for each of `rows` rows; row r of `out` is row first_row + r of the table.
struct Fill {
  float* out;
  int64_t rows;
  int64_t columns;
  int64_t first_row;
  Key key;
  uint32_t table;
  uint32_t step;
};

}  // namespace lazydp
