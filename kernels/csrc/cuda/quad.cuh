// Four floats of a row, moved as 16 bytes where rows are aligned to them (kVector), else one by one. Device memory is
// read and written past the first cache: what a lane moves, no other lane of the multiprocessor wants.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace lazydp::cuda {

constexpr int kQuad = 4;

struct alignas(16) Quad {
  float v[kQuad];
};

LAZYDP_DEVICE Quad same(float value) { return {{value, value, value, value}}; }

// Whether every row of a [*, columns] tensor that begins at `data` begins at a multiple of 16 bytes.
inline bool rows_are_aligned(const void* data, int64_t columns) {
  return columns % kQuad == 0 && reinterpret_cast<std::uintptr_t>(data) % sizeof(Quad) == 0;
}

inline int64_t quads_of(int64_t columns) { return (columns + kQuad - 1) / kQuad; }

// Of four columns from `column` on, those that exist.
LAZYDP_DEVICE int quad_width(int64_t column, int64_t columns) {
  const int64_t left = columns - column;
  return left < kQuad ? static_cast<int>(left) : kQuad;
}

template <bool kVector>
LAZYDP_DEVICE Quad load_quad(const float* from, int width) {
  Quad quad;
  if constexpr (kVector) {
#if defined(__CUDA_ARCH__)  // one instruction, which the compiler does not always make of an assignment
    const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
    quad = {{four.x, four.y, four.z, four.w}};
#else
    quad = *reinterpret_cast<const Quad*>(from);
#endif
  } else {
    LAZYDP_UNROLL
    for (int j = 0; j < kQuad; ++j) quad.v[j] = j < width ? from[j] : 0.0f;
  }
  return quad;
}

template <bool kVector>
LAZYDP_DEVICE void store_quad(float* to, const Quad& quad, int width) {
  if constexpr (kVector) {
#if defined(__CUDA_ARCH__)
    __stcg(reinterpret_cast<float4*>(to), make_float4(quad.v[0], quad.v[1], quad.v[2], quad.v[3]));
#else
    *reinterpret_cast<Quad*>(to) = quad;
#endif
  } else {
    LAZYDP_UNROLL
    for (int j = 0; j < kQuad; ++j) {
      if (j < width) to[j] = quad.v[j];
    }
  }
}

LAZYDP_DEVICE Quad load_shared(const float* from) { return *reinterpret_cast<const Quad*>(from); }

LAZYDP_DEVICE void store_shared(float* to, const Quad& quad) { *reinterpret_cast<Quad*>(to) = quad; }

// sum + w * quad, both operations rounded, as the CPU operators do it.
LAZYDP_DEVICE void add_product(Quad& sum, float w, const Quad& quad) {
  LAZYDP_UNROLL
  for (int j = 0; j < kQuad; ++j) sum.v[j] += w * quad.v[j];
}

}  // namespace lazydp::cuda
