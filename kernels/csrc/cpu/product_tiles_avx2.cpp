// The tiles of weighted products for AVX2 with FMA: 6 rows of two vectors of 8 fill 12 of the 16 registers.
#include "cpu/product_tiles.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cfloat>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace lazydp::cpu {
namespace {

struct V {
  static constexpr int kLanes = 8;
  static constexpr int kPanelVectors = 2;
  static constexpr int kTileRows = 6;
  using F = __m256;

  static F zero() { return _mm256_setzero_ps(); }
  static F splat(float a) { return _mm256_set1_ps(a); }
  static F load(const float* p) { return _mm256_load_ps(p); }
  static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static void add_to(double* sums, F a) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
    _mm256_store_pd(sums, _mm256_add_pd(_mm256_load_pd(sums), low));
    _mm256_store_pd(sums + 4, _mm256_add_pd(_mm256_load_pd(sums + 4), high));
  }

  using Mask = __m256i;
  static Mask mask(int64_t lanes) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lanes)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F load_anywhere(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_store_ps(p, a); }
  static void store(float* p, Mask some, F a) { _mm256_maskstore_ps(p, some, a); }
  static F scaled(const float* p, Mask some, F by) {
    const F product = _mm256_mul_ps(_mm256_maskload_ps(p, some), by);
    // "Not less than" holds for what is not a number: that stays.
    const F size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), product);
    return _mm256_and_ps(_mm256_cmp_ps(size, _mm256_set1_ps(FLT_MIN), _CMP_NLT_UQ), product);
  }
};

#include "cpu/product_tiles.inc"

}  // namespace

ProductKernels avx2_products() { return kernels(); }

}  // namespace lazydp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
