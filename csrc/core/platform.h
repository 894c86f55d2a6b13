// What a host compiler and nvcc must agree on. No torch here, and nothing of the C++ library that
// a device lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DRRLHF_HD __device__ __forceinline__
#else
#define DRRLHF_HD inline __attribute__((always_inline))
#endif

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define DRRLHF_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define DRRLHF_NO_UNROLL
#endif

// Whether the compiler makes one function for several widths of vectors (cpu/vectorised.h).
#if !defined(__CUDACC__) && defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(DRRLHF_NO_MULTIVERSION)
#define DRRLHF_MULTIVERSIONED
#endif
