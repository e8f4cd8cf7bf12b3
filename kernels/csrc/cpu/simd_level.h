// The instruction sets that the noise kernels are compiled for, and the one in use. All of them give the same bits.
#pragma once

#include <cstdint>

#include "cpu/noise.h"

namespace lazydp::cpu {

enum class SimdLevel : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

struct NoiseKernels {
  // Virtual rows [begin, end) of the draw: row i / segments, segment i % segments (see Segments in noise.cpp).
  void (*fill)(const Fill& job, int64_t segments, int64_t begin, int64_t end);
  // Positions [begin, end) of the list of rows.
  void (*wake)(const Wake& job, int64_t begin, int64_t end);
};

NoiseKernels portable_kernels();
#if defined(__x86_64__)
NoiseKernels avx2_kernels();
NoiseKernels avx512_kernels();
#endif

// The best level that this machine runs.
SimdLevel best_simd_level();
// The level in use: LAZYDP_SIMD (portable, avx2, avx512) where it names one that this machine runs, else the best.
SimdLevel simd_level();
// Returns false, and changes nothing, where this machine does not run `level`. For tests and benchmarks.
bool set_simd_level(SimdLevel level);
NoiseKernels noise_kernels();

}  // namespace lazydp::cpu
