// Threads, as the cores see them: someone else's parallel_for. In the extension it is torch's own pool (so
// torch.set_num_threads holds and no second pool fights it), in the sanitizer build it is std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lazydp::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

struct Parallel {
  // Calls body(from, to, context) on disjoint ranges that cover [begin, end), on as many threads as it likes.
  void (*run)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
  int threads;

  // Calls f(begin, end) on disjoint ranges that cover [begin, end), each of at least `grain` but the last. The ranges are
  // claimed one by one, not dealt out beforehand: a thread whose core is slow or shared takes fewer. f must not throw,
  // and what it computes must not depend on the ranges.
  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t grain, const F& f) const {
    if (begin >= end) return;
    constexpr int64_t kClaimsPerThread = 32;  // a slow core keeps the others waiting for one at most
    const int64_t share = (end - begin) / (kClaimsPerThread * threads);
    const int64_t size = std::max<int64_t>(std::max<int64_t>(grain, 1), share);
    const int64_t claims = (end - begin + size - 1) / size;
    if (threads == 1 || claims == 1) {
      f(begin, end);
      return;
    }
    std::atomic<int64_t> next{0};
    const auto claim = [&] {
      for (int64_t c = next++; c < claims; c = next++) f(begin + c * size, std::min(begin + (c + 1) * size, end));
    };
    const RangeBody body = [](int64_t, int64_t, void* context) { (*static_cast<decltype(claim)*>(context))(); };
    run(0, std::min<int64_t>(threads, claims), 1, body, const_cast<void*>(static_cast<const void*>(&claim)));
  }
};

}  // namespace lazydp::cpu
