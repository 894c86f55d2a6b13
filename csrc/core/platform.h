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

// A hot loop's entry point is compiled once for each of these and chosen at load time by the
// processor that runs it, so the build serves machines older and newer than the builder.
#if !defined(__CUDACC__) && defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(DRRLHF_NO_MULTIVERSION)
#define DRRLHF_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#define DRRLHF_MULTIVERSIONED
#define DRRLHF_ISA "x86-64, x86-64-v3, x86-64-v4 (chosen at load time)"
#else
#define DRRLHF_MULTIVERSION
#define DRRLHF_ISA "the compiler's default"
#endif
