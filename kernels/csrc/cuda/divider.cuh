// Division of a 64-bit number by one that the host knows: a multiplication where the machine would take a hundred
// instructions. Exact for numbers below 2^64 / divisor: with e = magic * divisor - 2^64, 0 <= e < divisor, the error of
// n * magic / 2^64 is n e / (divisor 2^64) < 1 / divisor, too little to reach the next whole number.
#pragma once

#include "cuda/launch.cuh"

namespace lazydp::cuda {

class Divider {
 public:
  explicit Divider(int64_t divisor)
      : divisor_(divisor), magic_(divisor > 1 ? ~uint64_t{0} / static_cast<uint64_t>(divisor) + 1 : 0) {}

  LAZYDP_DEVICE int64_t quotient(int64_t n) const {
    if (magic_ == 0) return n;
#if defined(__CUDA_ARCH__)
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), magic_));
#else
    __extension__ using Wide = unsigned __int128;
    return static_cast<int64_t>((static_cast<Wide>(n) * magic_) >> 64);
#endif
  }

  LAZYDP_DEVICE int64_t remainder(int64_t n, int64_t quotient) const { return n - quotient * divisor_; }

 private:
  int64_t divisor_;
  uint64_t magic_;
};

}  // namespace lazydp::cuda
