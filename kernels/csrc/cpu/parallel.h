// Threads, as the cores see them: someone else's parallel_for. In the extension it is torch's own pool (so
// torch.set_num_threads holds and no second pool fights it), in the sanitizer build it is std::thread.
#pragma once

#include <cstdint>

namespace lazydp::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

struct Parallel {
  void (*run)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
  int threads;

  // Calls f(begin, end) on disjoint ranges that cover [begin, end), each of at least `grain` unless it is the only one.
  // f must not throw: it runs on other threads.
  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t grain, const F& f) const {
    if (begin >= end) return;
    const RangeBody body = [](int64_t from, int64_t to, void* context) { (*static_cast<const F*>(context))(from, to); };
    run(begin, end, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
  }
};

}  // namespace lazydp::cpu
