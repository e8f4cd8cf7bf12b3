// The instruction sets that the kernels are compiled for, and the one in use. All of them give the same bits; AMX alone does not,
// in weighted products, and is AVX-512 everywhere else.
#pragma once

#include <cstdint>

#include "cpu/noise.h"

namespace lazydp::cpu {

enum class SimdLevel : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

struct NoiseKernels {
  // Virtual rows [begin, end) of the draw: row i / segments, segment i % segments (see segments_per_row in noise.cpp).
  void (*fill)(const Fill& job, int64_t segments, int64_t begin, int64_t end);
  // Positions [begin, end) of the list of rows.
  void (*catch_up)(const CatchUp& job, int64_t begin, int64_t end);
  // For tests, the two halves of a draw: ChaCha20 of `blocks` inputs, [blocks, 16] with RFC 8439's constants, and the normals,
  // [blocks, 12], of given words, [blocks, 16].
  void (*blocks_of_inputs)(const uint32_t* inputs, int64_t blocks, uint32_t* out);
  void (*normals_of_blocks)(const uint32_t* words, int64_t blocks, float* out);
};

NoiseKernels portable_kernels();
#if defined(__x86_64__)
NoiseKernels avx2_kernels();
NoiseKernels avx512_kernels();
#endif

// The best level that this machine runs.
SimdLevel best_simd_level();
// The level in use: LAZYDP_SIMD (portable, avx2, avx512, amx) where it names one that this machine runs, else the best.
SimdLevel simd_level();
// Returns false, and changes nothing, where this machine does not run `level`. For tests and benchmarks.
bool set_simd_level(SimdLevel level);
NoiseKernels noise_kernels();

}  // namespace lazydp::cpu
