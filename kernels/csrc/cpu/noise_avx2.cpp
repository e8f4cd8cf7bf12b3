// The noise kernels for AVX2 with FMA: 8 lanes.
#include "cpu/simd_level.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "common/gaussian.h"
#include "common/skip_ahead.h"

// Everything from the standard library is included above, so none of its inline functions is compiled for AVX2 and
// then taken by the linker for the other levels.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace lazydp::cpu {
namespace {

#include "cpu/chacha20_avx2.inc"
#include "cpu/chacha20_lanes.inc"

struct V {
  static constexpr int kLanes = 8;
  using U = __m256i;
  using F = __m256;

  // Box-Muller has no registers beside the 16 words of ChaCha20.
  static constexpr bool kOverlap = false;

  static void chacha20(const U* input, const U* started, U* words) { chacha20_avx2(input, started, words); }

  static U splat(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
  static U splat(int a) { return _mm256_set1_epi32(a); }
  static F splat(float a) { return _mm256_set1_ps(a); }
  static U load(const uint32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint32_t* p, U a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }
  static F load(const float* p) { return _mm256_load_ps(p); }

  static U add(U a, U b) { return _mm256_add_epi32(a, b); }
  static U sub(U a, U b) { return _mm256_sub_epi32(a, b); }
  static U bit_xor(U a, U b) { return _mm256_xor_si256(a, b); }
  static U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
  static U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
  template <int kBits> static U shift_left(U a) { return _mm256_slli_epi32(a, kBits); }
  template <int kBits> static U shift_right(U a) { return _mm256_srli_epi32(a, kBits); }
  static U sign_mask(U a) { return _mm256_cmpgt_epi32(_mm256_setzero_si256(), a); }
  template <int kBits> static U rotate(U a) {
    // Whole bytes move in one shuffle; a rotation by other counts takes three operations.
    if constexpr (kBits == 16)
      return _mm256_shuffle_epi8(a, _mm256_set_epi8(13, 12, 15, 14, 9, 8, 11, 10, 5, 4, 7, 6, 1, 0, 3, 2, 13, 12, 15, 14, 9, 8,
                                                    11, 10, 5, 4, 7, 6, 1, 0, 3, 2));
    if constexpr (kBits == 8)
      return _mm256_shuffle_epi8(a, _mm256_set_epi8(14, 13, 12, 15, 10, 9, 8, 11, 6, 5, 4, 7, 2, 1, 0, 3, 14, 13, 12, 15, 10, 9,
                                                    8, 11, 6, 5, 4, 7, 2, 1, 0, 3));
    return _mm256_or_si256(_mm256_slli_epi32(a, kBits), _mm256_srli_epi32(a, 32 - kBits));
  }

  static F to_float(U a) { return _mm256_cvtepi32_ps(a); }
  static F as_float(U a) { return _mm256_castsi256_ps(a); }
  static U as_bits(F a) { return _mm256_castps_si256(a); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F root(F a) { return _mm256_sqrt_ps(a); }
  // By the sign bit of `which`: set, then a.
  static F select(U which, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(which)); }

  // From z[column] of lanes to z[k] with the four columns of lane k, then those of lane k + 4.
  static void transpose(F z[4]) {
    const F a = _mm256_unpacklo_ps(z[0], z[1]);
    const F b = _mm256_unpackhi_ps(z[0], z[1]);
    const F c = _mm256_unpacklo_ps(z[2], z[3]);
    const F d = _mm256_unpackhi_ps(z[2], z[3]);
    z[0] = _mm256_shuffle_ps(a, c, 0x44);
    z[1] = _mm256_shuffle_ps(a, c, 0xee);
    z[2] = _mm256_shuffle_ps(b, d, 0x44);
    z[3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  // Four times each: at out[k] the value of lane k, then that of lane k + 4.
  static void spread(const float* of_lanes, float (*out)[kLanes]) {
    const U first = _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0);
    for (int k = 0; k < 4; ++k) _mm256_store_ps(out[k], _mm256_permutevar8x32_ps(load(of_lanes), add(first, splat(k))));
  }
  static F gather(float* const* rows, int64_t at) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[0] + at)), _mm_loadu_ps(rows[4] + at), 1);
  }
  static void scatter(float* const* rows, int64_t at, F z) {
    _mm_storeu_ps(rows[0] + at, _mm256_castps256_ps128(z));
    _mm_storeu_ps(rows[4] + at, _mm256_extractf128_ps(z, 1));
  }
};

#include "cpu/noise_lanes.inc"

}  // namespace

NoiseKernels avx2_kernels() { return {fill, catch_up_positions, blocks_of_inputs, normals_of_blocks}; }

}  // namespace lazydp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
