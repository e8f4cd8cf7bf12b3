// BLAKE2b of 8 texts at once, with AVX-512.
#include "rows/blake2b.h"
#include "rows/blake2b_levels.h"

#if defined(__x86_64__)

// Everything from the standard library is included above, so none of its inline functions is compiled for this instruction
// set and then taken by the linker for the others.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
#endif

namespace lazydp::rows::blake2b {
namespace {

constexpr int kLanes = 8;
#include "rows/blake2b_lanes.inc"

}  // namespace

Lanes avx512_lanes() { return {kLanes, last_blocks}; }

}  // namespace lazydp::rows::blake2b

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
