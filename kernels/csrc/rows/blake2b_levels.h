// The instruction sets that BLAKE2b is compiled for.
#pragma once

#include "rows/blake2b.h"

namespace lazydp::rows::blake2b {

#if defined(__x86_64__)
Lanes avx2_lanes();
Lanes avx512_lanes();
#endif

}  // namespace lazydp::rows::blake2b
