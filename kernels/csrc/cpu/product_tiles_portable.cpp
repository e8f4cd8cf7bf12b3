// The tiles of weighted products in plain C++.
#include <cfloat>
#include <cmath>

#include "cpu/product_tiles.h"
#include "cpu/simd_level.h"

namespace lazydp::cpu {
namespace {

struct V {
  static constexpr int kLanes = 4;
  static constexpr int kPanelVectors = 1;
  static constexpr int kTileRows = 4;
  struct F {
    float lane[kLanes];
  };

  static F zero() { return {}; }
  static F splat(float a) { return {{a, a, a, a}}; }
  static F load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static F multiply_add(const F& a, const F& b, const F& c) {
    F sum;
    for (int i = 0; i < kLanes; ++i) sum.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return sum;
  }
  static void add_to(double* sums, const F& a) {
    for (int i = 0; i < kLanes; ++i) sums[i] += static_cast<double>(a.lane[i]);
  }

  using Mask = int64_t;
  static Mask mask(int64_t lanes) { return lanes; }
  static F load_anywhere(const float* p) { return load(p); }
  static void store(float* p, const F& a) { store(p, kLanes, a); }
  static void store(float* p, Mask some, const F& a) {
    for (int64_t i = 0; i < some; ++i) p[i] = a.lane[i];
  }
  static F scaled(const float* p, Mask some, const F& by) {
    F product{};
    for (int64_t i = 0; i < some; ++i) {
      const float lane = by.lane[i] * p[i];
      product.lane[i] = std::fabs(lane) < FLT_MIN ? 0.0f : lane;
    }
    return product;
  }
};

#include "cpu/product_tiles.inc"

}  // namespace

ProductKernels portable_products() { return kernels(); }

ProductKernels product_kernels() {
#if defined(__x86_64__)
  if (simd_level() >= SimdLevel::kAvx512) return avx512_products();
  if (simd_level() == SimdLevel::kAvx2) return avx2_products();
#endif
  return portable_products();
}

}  // namespace lazydp::cpu
