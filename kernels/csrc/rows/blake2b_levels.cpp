#include "rows/blake2b_levels.h"

#include <cstdlib>
#include <string_view>

namespace lazydp::rows::blake2b {
namespace {

constexpr Lanes kPortable = {1, nullptr};
constexpr Lanes kNone = {0, nullptr};

}  // namespace

Lanes lanes_named(const char* name) {
  const std::string_view wanted = name;
  if (wanted == "portable") return kPortable;
#if defined(__x86_64__)
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (wanted == "avx512" && wide) return avx512_lanes();
  if (wanted == "avx2" && __builtin_cpu_supports("avx2")) return avx2_lanes();
#endif
  return kNone;
}

Lanes best_lanes() {
  static const Lanes best = [] {
    if (const char* wanted = std::getenv("LAZYDP_SIMD")) {
      const Lanes named = lanes_named(wanted);
      if (named.count != 0) return named;
    }
    for (const char* name : {"avx512", "avx2"}) {
      const Lanes lanes = lanes_named(name);
      if (lanes.count != 0) return lanes;
    }
    return kPortable;
  }();
  return best;
}

}  // namespace lazydp::rows::blake2b
