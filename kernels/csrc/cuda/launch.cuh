// How the body of a kernel is run: by nvcc on a grid, by a C++ compiler on the host, thread after thread.
//
// A body is a struct of its arguments, passed to the kernel by value. There are two kinds:
//
//     each        count items, independent of one another:  body(i)
//     each_tile   count tiles, one a warp, in two phases:   body.first(tile, lane, thread, shared)   for 32 lanes,
//                                                           body.second(tile, lane, thread, shared)  for 32 lanes.
//                 `thread` keeps a lane's registers between the phases, `shared` is memory of the warp.
//
// No body holds a barrier or a warp operation: the only barriers are those between the phases, here. So the host runs the
// same bodies by loops, in any order of threads, and an access outside a tensor or a dependence on that order shows without
// a GPU (tests/kernels/cuda_host).
//
// Grids are persistent: a few blocks for each multiprocessor, that stride over the items. Nothing here allocates or waits.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

#if defined(__CUDACC__)
#include <cassert>
#define LAZYDP_DEVICE __device__ __forceinline__
#define LAZYDP_UNROLL _Pragma("unroll")
#else
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>
#define LAZYDP_DEVICE inline
#define LAZYDP_UNROLL
#endif

namespace lazydp::cuda {

constexpr int kLanes = 32;
constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 16;

// Stops for good where an argument is wrong: on the device as a failed assertion does (the next call of the CUDA runtime
// reports it, and the context stays unusable), on the host by an exception. Noise must not be skipped silently.
#if defined(__CUDACC__)
// The trap is never reached: it tells the assembler that nothing need be kept across the call.
#define LAZYDP_REFUSE(message) (__assert_fail(message, __FILE__, __LINE__, "lazydp"), __trap(), __builtin_unreachable())
#else
#define LAZYDP_REFUSE(message) throw std::invalid_argument(message)
#endif

template <class Body>
LAZYDP_DEVICE void stride_over_items(const Body& body, int64_t first, int64_t stride) {
  for (int64_t i = first; i < body.count; i += stride) body(i);
}

#if defined(__CUDACC__)

template <class Body>
__global__ void __launch_bounds__(kThreads) item_kernel(const __grid_constant__ Body body) {
  stride_over_items(body, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads);
}

template <class Body>
__global__ void __launch_bounds__(kThreads) tile_kernel(const __grid_constant__ Body body) {
  constexpr int kWarps = kThreads / kLanes;
  __shared__ typename Body::Shared shared[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t tile = int64_t{blockIdx.x} * kWarps + warp; tile < body.count; tile += stride) {
    typename Body::Thread thread;
    body.first(tile, lane, thread, shared[warp]);
    __syncwarp();
    body.second(tile, lane, thread, shared[warp]);
    __syncwarp();
  }
}

// The blocks that `items` work items of `per_block` a block need, at most a few for each multiprocessor; 0 on an error.
inline unsigned grid_for(int64_t items, int per_block, cudaError_t& error) {
  int device = 0;
  int multiprocessors = 0;
  error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return 0;
  const int64_t needed = (items + per_block - 1) / per_block;
  const int64_t most = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  return static_cast<unsigned>(needed < most ? needed : most);
}

template <class Body>
cudaError_t each(const Body& body, cudaStream_t stream) {
  if (body.count <= 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  const unsigned blocks = grid_for(body.count, kThreads, error);
  if (error != cudaSuccess) return error;
  item_kernel<<<blocks, kThreads, 0, stream>>>(body);
  return cudaGetLastError();
}

template <class Body>
cudaError_t each_tile(const Body& body, cudaStream_t stream) {
  if (body.count <= 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  const unsigned blocks = grid_for(body.count, kThreads / kLanes, error);
  if (error != cudaSuccess) return error;
  tile_kernel<<<blocks, kThreads, 0, stream>>>(body);
  return cudaGetLastError();
}

#else  // the host's shim

// In what order the shim runs what a GPU runs at once. Results must not depend on it.
enum class Order : int { kForward = 0, kBackward = 1, kShuffled = 2 };
inline Order& order() {
  static Order value = Order::kForward;
  return value;
}

inline std::vector<int> in_order(int count) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order() == Order::kBackward) std::reverse(numbers.begin(), numbers.end());
  if (order() == Order::kShuffled) {
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (int i = count - 1; i > 0; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(numbers[i], numbers[(state >> 33) % static_cast<uint64_t>(i + 1)]);
    }
  }
  return numbers;
}

// Small and odd, so that every thread strides and the last round is ragged.
constexpr int kHostThreads = 3 * kLanes;
constexpr int kHostWarps = 3;

template <class Body>
cudaError_t each(const Body& body, cudaStream_t) {
  for (int thread : in_order(kHostThreads)) stride_over_items(body, thread, kHostThreads);
  return cudaSuccess;
}

template <class Body>
cudaError_t each_tile(const Body& body, cudaStream_t) {
  const std::vector<int> lanes = in_order(kLanes);
  std::vector<typename Body::Thread> threads(kLanes);
  for (int warp : in_order(kHostWarps)) {
    typename Body::Shared shared;
    for (int64_t tile = warp; tile < body.count; tile += kHostWarps) {
      for (int lane : lanes) body.first(tile, lane, threads[lane], shared);
      for (int lane : lanes) body.second(tile, lane, threads[lane], shared);
    }
  }
  return cudaSuccess;
}

#endif

}  // namespace lazydp::cuda
