// How the rows of a batch are listed on the device, where their number is known to no one on the host.
//
// group_rows finds U distinct rows among N lookups, and U stays on the device: to read it the host would have to wait. So
// lists of distinct rows are N long, with kNoRow after the U rows, and `starts` is N + 1 long, with N after starts[U - 1].
// Kernels pass over what is padded: no row, no lookups.
#pragma once

#include <cstdint>

namespace lazydp::cuda {

constexpr int64_t kNoRow = -1;

}  // namespace lazydp::cuda
