// Threads, as the cores see them: someone else's parallel_for. In the extension it is torch's own pool (so
// torch.set_num_threads holds and no second pool fights it), in the sanitizer build it is std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace lazydp::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

struct Parallel {
  // Calls body(from, to, context) on disjoint ranges that cover [begin, end), on as many threads as it likes.
  void (*run)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
  int threads;

  // Calls f(i) once for each i in [0, count). They are claimed one by one, not dealt out beforehand: a thread whose core is
  // slow or shared takes fewer. f must not throw, and what it computes must not depend on the order.
  template <class F>
  void each(int64_t count, const F& f) const {
    if (threads == 1 || count <= 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    std::atomic<int64_t> next{0};
    const auto claim = [&] {
      for (int64_t i = next++; i < count; i = next++) f(i);
    };
    const RangeBody body = [](int64_t, int64_t, void* context) { (*static_cast<decltype(claim)*>(context))(); };
    run(0, std::min<int64_t>(threads, count), 1, body, const_cast<void*>(static_cast<const void*>(&claim)));
  }

  // Calls f(begin, end) on disjoint ranges that cover [begin, end), each of at least `grain` but the last.
  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t grain, const F& f) const {
    if (begin >= end) return;
    const int64_t size = threads == 1 ? end - begin : range_size(end - begin, grain);
    each((end - begin + size - 1) / size, [&](int64_t i) { f(begin + i * size, std::min(begin + (i + 1) * size, end)); });
  }

  int64_t range_size(int64_t count, int64_t grain) const {
    constexpr int64_t kRangesPerThread = 32;  // a slow core keeps the others waiting for one at most
    return std::max<int64_t>(std::max<int64_t>(grain, 1), count / (kRangesPerThread * threads));
  }
};

// On the thread that asks.
inline constexpr Parallel kSerial{nullptr, 1};

// Several jobs done as one: threads start once and wait once for all of them, and none idles while another job has work.
class JobRanges {
 public:
  explicit JobRanges(const Parallel& parallel) : parallel_(parallel) {}

  // [0, count) of `job`, in ranges of at least `grain` but the last.
  void add(int64_t job, int64_t count, int64_t grain) {
    const int64_t size = parallel_.range_size(count, grain);
    for (int64_t begin = 0; begin < count; begin += size) ranges_.push_back({job, begin, std::min(begin + size, count)});
  }

  // Calls f(job, begin, end) on every range.
  template <class F>
  void each(const F& f) const {
    parallel_.each(static_cast<int64_t>(ranges_.size()),
                   [&](int64_t i) { f(ranges_[i].job, ranges_[i].begin, ranges_[i].end); });
  }

 private:
  struct Range {
    int64_t job;
    int64_t begin;
    int64_t end;
  };

  const Parallel& parallel_;
  std::vector<Range> ranges_;
};

}  // namespace lazydp::cpu
