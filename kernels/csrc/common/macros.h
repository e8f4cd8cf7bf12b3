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

// What must not become a call: a function that is compiled for several instruction sets, each time with its caller.
#define LAZYDP_INLINE static inline __attribute__((always_inline))
#define LAZYDP_INLINE_MEMBER inline __attribute__((always_inline))
