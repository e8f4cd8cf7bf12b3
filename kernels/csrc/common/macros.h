// Marks what both compilers must compile: the host compiler for the CPU operators, nvcc for the CUDA ones.
#pragma once

#if defined(__CUDACC__)
#define LAZYDP_HD __device__ __forceinline__
// A table of constants: device code may not index a host array, not even a constexpr one.
#define LAZYDP_TABLE __device__ constexpr
#else
#define LAZYDP_HD inline
#define LAZYDP_TABLE constexpr
#endif
