// Marks what both compilers must compile: the host compiler for the CPU operators, nvcc for the CUDA ones.
#pragma once

#if defined(__CUDACC__)
#define LAZYDP_HD __host__ __device__ __forceinline__
#else
#define LAZYDP_HD inline
#endif
