// Twelve standard normals from the sixteen words of one ChaCha20 block.
//
// FIXED FORMAT. Column c of a draw is normal c % 12 of block c / 12. Normals 2p and 2p + 1 are pair p, 0 <= p < 6, of
//
//     angle word    w[p]       a, read as signed:  phi = a * pi / 2^32 in [-pi/2, pi/2), and bit 0 turns the half plane
//     radius word   w[6 + p]   x, read as signed:  the sign says from which end of (0, 1) u is measured,
//                              n = x < 0 ? ~x : x  are 31 bits of the distance to that end
//     fine bits     from w[12..15], 21 a pair:     l, odd, 22 bits:
//                              p < 4   l = (w[12 + p] >> 10) | 1
//                              p = 4   l = (((w[12] << 11) ^ (w[13] & 0x7ff)) & 0x3fffff) | 1
//                              p = 5   l = (((w[14] << 11) ^ (w[15] & 0x7ff)) & 0x3fffff) | 1
//
//     y = (n + l / 2^22) / 2^32 in (0, 1/2),  u = x < 0 ? 1 - y : y,  radius = sqrt(-2 ln u)
//     normal 2p     = radius * cos(phi), negated where bit 0 of a is set
//     normal 2p + 1 = radius * sin(phi)
//
// u has 32 + 21 = 53 random bits and is never 0 or 1. Measured from the nearer end it keeps its relative precision
// in float at both: the radius reaches sqrt(-2 ln 2^-54) = 8.65, and its smallest value is 1e-8, not 0.
//
// Only operations that IEEE 754 rounds correctly are used (add, multiply, fma, square root, conversion), in one fixed order,
// so that every instruction set, and CUDA, gives the same bits. Compile with -ffp-contract=off (nvcc: --fmad=false).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/chacha20.h"
#include "common/macros.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace lazydp {

constexpr int kNormalsPerBlock = 12;
constexpr int kPairsPerBlock = 6;

// -2 ln(1 + s) = s (-2 + s (1 + s Q(s))) on [-1/4, 1/2]; relative error below 4.1e-8. Minimax by Lawson's iteration.
constexpr int kLogTerms = 7;
LAZYDP_TABLE float kLog[kLogTerms] = {-0.6666694283485413f,  0.49992722272872925f, -0.3996464014053345f, 0.3357764482498169f,
                                      -0.29808875918388367f, 0.24228177964687347f, -0.11119335889816284f};
// sin(pi/2 t) = t S(t^2), cos(pi/2 t) = C(t^2) on [-1, 1]; absolute errors below 6.8e-9 and 2.2e-10 before rounding.
constexpr int kSinTerms = 5;
LAZYDP_TABLE float kSin[kSinTerms] = {1.5707963705062866f, -0.6459637880325317f, 0.07968992739915848f, -0.004674157593399286f,
                                      0.00015167852689046413f};
constexpr int kCosTerms = 6;
LAZYDP_TABLE float kCos[kCosTerms] = {
    1.0f, -1.2337005138397217f, 0.2536693215370178f, -0.02086268924176693f, 0.0009177248575724661f, -2.3824917661841027e-05f};

constexpr float kTwoToMinus22 = 2.384185791015625e-07f;
constexpr float kTwoToMinus31 = 4.656612873077393e-10f;
constexpr float kTwoToMinus32 = 2.3283064365386963e-10f;
constexpr uint32_t kOneBits = 0x3f800000u;            // 1.0f
constexpr uint32_t kThreeQuartersBits = 0x3f400000u;  // 0.75f
constexpr uint32_t kExponentMask = 0xff800000u;
constexpr uint32_t kSignBit = 0x80000000u;
// -2 ln 2 / 2^23: an exponent still in its place in the word is 2^23 times too large.
constexpr float kMinusTwoLn2Shifted = static_cast<float>(-1.3862943611198906 / 8388608.0);

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float difference(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float to_float(uint32_t signed_bits) { return __int2float_rn(static_cast<int32_t>(signed_bits)); }
__device__ __forceinline__ uint32_t bits_of(float a) { return __float_as_uint(a); }
__device__ __forceinline__ float float_of(uint32_t a) { return __uint_as_float(a); }
#else
LAZYDP_HD float fused(float a, float b, float c) { return std::fma(a, b, c); }
LAZYDP_HD float root(float a) { return std::sqrt(a); }
LAZYDP_HD float product(float a, float b) { return a * b; }
LAZYDP_HD float difference(float a, float b) { return a - b; }
LAZYDP_HD float to_float(uint32_t signed_bits) { return static_cast<float>(static_cast<int32_t>(signed_bits)); }
LAZYDP_HD uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
LAZYDP_HD float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
#endif

LAZYDP_HD uint32_t fine_bits(const uint32_t w[kBlockWords], int pair) {
  if (pair < 4) return (w[12 + pair] >> 10) | 1u;
  const uint32_t* low = w + 12 + 2 * (pair - 4);
  return (((low[0] << 11) ^ (low[1] & 0x7ffu)) & 0x3fffffu) | 1u;
}

// One Box-Muller pair: z[0] = radius * cos, z[1] = radius * sin.
LAZYDP_HD void box_muller(uint32_t angle, uint32_t radius, uint32_t fine, float z[2]) {
  const bool from_one = (radius & kSignBit) != 0;
  const uint32_t n = from_one ? ~radius : radius;
  const float y = fused(to_float(fine), kTwoToMinus22 * kTwoToMinus32, product(to_float(n), kTwoToMinus32));
  const float u = from_one ? difference(1.0f, y) : y;

  // u = 2^e (1 + s) with 1 + s in [3/4, 3/2); s comes from y, not from the rounded u, so it is exact near u = 1.
  const uint32_t exponent = (bits_of(u) - kThreeQuartersBits) & kExponentMask;
  const float scale = float_of(kOneBits - exponent);
  const float s = from_one ? fused(-scale, y, difference(scale, 1.0f)) : fused(scale, y, -1.0f);
  float q = kLog[kLogTerms - 1];
  for (int i = kLogTerms - 2; i >= 0; --i) q = fused(q, s, kLog[i]);
  q = fused(q, s, 1.0f);
  q = fused(q, s, -2.0f);
  const float r = root(fused(to_float(exponent), kMinusTwoLn2Shifted, product(q, s)));

  const float t = product(to_float(angle), kTwoToMinus31);
  const float t2 = product(t, t);
  float sine = kSin[kSinTerms - 1];
  for (int i = kSinTerms - 2; i >= 0; --i) sine = fused(sine, t2, kSin[i]);
  sine = product(sine, t);
  float cosine = kCos[kCosTerms - 1];
  for (int i = kCosTerms - 2; i >= 0; --i) cosine = fused(cosine, t2, kCos[i]);
  cosine = float_of(bits_of(cosine) ^ (angle << 31));

  z[0] = product(r, cosine);
  z[1] = product(r, sine);
}

LAZYDP_HD void normals_of_block(const uint32_t w[kBlockWords], float z[kNormalsPerBlock]) {
  for (int p = 0; p < kPairsPerBlock; ++p) box_muller(w[p], w[6 + p], fine_bits(w, p), z + 2 * p);
}

}  // namespace lazydp
