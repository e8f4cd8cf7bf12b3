// How a row catches up with its pending noise: s <- M s + L z, for one element.
//
//     dimension 1   s = weight               M = (m),                  L = (l)
//     dimension 2   s = (weight, momentum)   M = (m11, m12, m21, m22),  L = (l11, l21, l22), lower triangular
//
// In dimension 2 the second normal of column c comes from the block with counter 0x80000000 + c / 12, the first one as
// in dimension 1. The order of operations is fixed, for the same bits on every instruction set and on CUDA.
#pragma once

#include "common/gaussian.h"

namespace lazydp {

constexpr uint32_t kSecondNormal = 0x80000000u;

LAZYDP_HD float catch_up(float weight, float m, float l, float z) { return fused(l, z, product(m, weight)); }

LAZYDP_HD void catch_up_with_momentum(float& weight, float& momentum, const float m[4], const float l[3], float z1, float z2) {
  const float w = fused(l[0], z1, fused(m[1], momentum, product(m[0], weight)));
  const float v = fused(l[2], z2, fused(l[1], z1, fused(m[3], momentum, product(m[2], weight))));
  weight = w;
  momentum = v;
}

}  // namespace lazydp
