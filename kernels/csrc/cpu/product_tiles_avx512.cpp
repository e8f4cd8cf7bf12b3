// The tiles of weighted products for AVX-512: 14 rows of two vectors of 16 fill 28 of the 32 registers.
#include "cpu/product_tiles.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cfloat>

// GCC 12 takes the deliberately undefined operands of its own AVX-512 headers for mistakes (PR 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw")
#endif

namespace lazydp::cpu {
namespace {

struct V {
  static constexpr int kLanes = 16;
  static constexpr int kPanelVectors = 2;
  static constexpr int kTileRows = 14;
  using F = __m512;

  static F zero() { return _mm512_setzero_ps(); }
  static F splat(float a) { return _mm512_set1_ps(a); }
  static F load(const float* p) { return _mm512_load_ps(p); }
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static void add_to(double* sums, F a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    _mm512_store_pd(sums, _mm512_add_pd(_mm512_load_pd(sums), low));
    _mm512_store_pd(sums + 8, _mm512_add_pd(_mm512_load_pd(sums + 8), high));
  }

  using Mask = __mmask16;
  static Mask mask(int64_t lanes) { return static_cast<Mask>((1u << lanes) - 1); }
  static F load_anywhere(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_store_ps(p, a); }
  static void store(float* p, Mask some, F a) { _mm512_mask_storeu_ps(p, some, a); }
  static F scaled(const float* p, Mask some, F by) {
    const F product = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, p), by);
    // "Not less than" holds for what is not a number: that stays.
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(product), _mm512_set1_ps(FLT_MIN), _CMP_NLT_UQ), product);
  }
};

#include "cpu/product_tiles.inc"

}  // namespace

ProductKernels avx512_products() { return kernels(); }

}  // namespace lazydp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
