// The names of the CUDA runtime that the launchers' interface needs; stand-ins where the host compiles the kernels.
#pragma once

#if defined(LAZYDP_CUDA_HOST)
namespace lazydp::cuda {
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
}  // namespace lazydp::cuda
#else
#include <cuda_runtime_api.h>
#endif
