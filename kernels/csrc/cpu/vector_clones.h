// Marks a function to be compiled for several instruction sets, the best of which the loader takes. For element-wise loops,
// whose results do not depend on the width of the vectors (and -ffp-contract=off keeps fma out of them).
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// The loader chooses before a sanitizer's runtime is there.
#define LAZYDP_VECTOR_CLONES
#elif defined(__x86_64__) && defined(__gnu_linux__)
#define LAZYDP_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LAZYDP_VECTOR_CLONES
#endif
