#include "cpu/simd_level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/weighted_products_amx.h"

namespace lazydp::cpu {
namespace {

SimdLevel initial_level() {
  const SimdLevel best = best_simd_level();
  const char* wanted = std::getenv("LAZYDP_SIMD");
  if (!wanted) return best;
  SimdLevel level = best;
  if (std::strcmp(wanted, "portable") == 0) level = SimdLevel::kPortable;
  if (std::strcmp(wanted, "avx2") == 0) level = SimdLevel::kAvx2;
  if (std::strcmp(wanted, "avx512") == 0) level = SimdLevel::kAvx512;
  if (std::strcmp(wanted, "amx") == 0) level = SimdLevel::kAmx;
  return level <= best ? level : best;
}

std::atomic<SimdLevel>& level_in_use() {
  static std::atomic<SimdLevel> level{initial_level()};
  return level;
}

}  // namespace

SimdLevel best_simd_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    return can_use_amx() ? SimdLevel::kAmx : SimdLevel::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kPortable;
}

SimdLevel simd_level() { return level_in_use().load(std::memory_order_relaxed); }

bool set_simd_level(SimdLevel level) {
  if (level < SimdLevel::kPortable || level > best_simd_level()) return false;
  level_in_use().store(level, std::memory_order_relaxed);
  return true;
}

NoiseKernels noise_kernels() {
#if defined(__x86_64__)
  if (simd_level() >= SimdLevel::kAvx512) return avx512_kernels();
  if (simd_level() == SimdLevel::kAvx2) return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace lazydp::cpu
