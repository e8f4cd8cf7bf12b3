// The noise kernels for AVX-512 (F, DQ and BW): 16 lanes.
#include "cpu/simd_level.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "common/gaussian.h"
#include "common/skip_ahead.h"

// Everything from the standard library is included above, so none of its inline functions is compiled for AVX-512 and
// then taken by the linker for the other levels.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw")
#endif

namespace lazydp::cpu {
namespace {

// GCC 12 takes the deliberately undefined operands of its own AVX-512 headers for mistakes (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "cpu/chacha20_lanes.inc"

struct V {
  static constexpr int kLanes = 16;
  using U = __m512i;
  using F = __m512;

  // 32 registers hold the 16 words of ChaCha20 and what Box-Muller needs beside them.
  static constexpr bool kOverlap = true;

  static void chacha20(const U* input, const U* started, U* words) {
    Nothing nothing;
    chacha20_lanes<V>(input, started, words, nothing);
  }

  static U splat(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  static U splat(int a) { return _mm512_set1_epi32(a); }
  static F splat(float a) { return _mm512_set1_ps(a); }
  static U load(const uint32_t* p) { return _mm512_load_si512(p); }
  static void store(uint32_t* p, U a) { _mm512_store_si512(p, a); }
  static F load(const float* p) { return _mm512_load_ps(p); }

  static U add(U a, U b) { return _mm512_add_epi32(a, b); }
  static U sub(U a, U b) { return _mm512_sub_epi32(a, b); }
  static U bit_xor(U a, U b) { return _mm512_xor_si512(a, b); }
  static U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
  static U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
  template <int kBits> static U shift_left(U a) { return _mm512_slli_epi32(a, kBits); }
  template <int kBits> static U shift_right(U a) { return _mm512_srli_epi32(a, kBits); }
  static U sign_mask(U a) { return _mm512_srai_epi32(a, 31); }
  template <int kBits> static U rotate(U a) {
    // Of the two ports for vectors one rotates and the other shuffles: a quarter of the rotations go to the other.
    if constexpr (kBits == 16) return _mm512_shuffle_epi8(a, _mm512_set4_epi32(0x0d0c0f0e, 0x09080b0a, 0x05040706, 0x01000302));
    return _mm512_rol_epi32(a, kBits);
  }

  static F to_float(U a) { return _mm512_cvtepi32_ps(a); }
  static F as_float(U a) { return _mm512_castsi512_ps(a); }
  static U as_bits(F a) { return _mm512_castps_si512(a); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F root(F a) { return _mm512_sqrt_ps(a); }
  // By the sign bit of `which`: set, then a.
  static F select(U which, F a, F b) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(which), b, a); }

  // From z[column] of lanes to z[k] with the four columns of lane k, then those of lanes k + 4, k + 8, k + 12.
  static void transpose(F z[4]) {
    const F a = _mm512_unpacklo_ps(z[0], z[1]);
    const F b = _mm512_unpackhi_ps(z[0], z[1]);
    const F c = _mm512_unpacklo_ps(z[2], z[3]);
    const F d = _mm512_unpackhi_ps(z[2], z[3]);
    z[0] = _mm512_shuffle_ps(a, c, 0x44);
    z[1] = _mm512_shuffle_ps(a, c, 0xee);
    z[2] = _mm512_shuffle_ps(b, d, 0x44);
    z[3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  // Four times each: at out[k] the value of lane k, then those of lanes k + 4, k + 8, k + 12.
  static void spread(const float* of_lanes, float (*out)[kLanes]) {
    const U first = _mm512_set_epi32(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0);
    for (int k = 0; k < 4; ++k) _mm512_store_ps(out[k], _mm512_permutexvar_ps(add(first, splat(k)), load(of_lanes)));
  }
  static F gather(float* const* rows, int64_t at) {
    F z = _mm512_castps128_ps512(_mm_loadu_ps(rows[0] + at));
    z = _mm512_insertf32x4(z, _mm_loadu_ps(rows[4] + at), 1);
    z = _mm512_insertf32x4(z, _mm_loadu_ps(rows[8] + at), 2);
    return _mm512_insertf32x4(z, _mm_loadu_ps(rows[12] + at), 3);
  }
  static void scatter(float* const* rows, int64_t at, F z) {
    _mm_storeu_ps(rows[0] + at, _mm512_castps512_ps128(z));
    _mm_storeu_ps(rows[4] + at, _mm512_extractf32x4_ps(z, 1));
    _mm_storeu_ps(rows[8] + at, _mm512_extractf32x4_ps(z, 2));
    _mm_storeu_ps(rows[12] + at, _mm512_extractf32x4_ps(z, 3));
  }
};

#include "cpu/noise_lanes.inc"

}  // namespace

NoiseKernels avx512_kernels() { return {fill, catch_up_positions, blocks_of_inputs, normals_of_blocks}; }

}  // namespace lazydp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
