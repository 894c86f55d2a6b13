// What kernels share: numbers of any dtype, launches, and CUDA itself, or for the tests a stand-in
// for it that runs kernels on the host (tests/emulated).
#pragma once

#if defined(DRRLHF_EMULATED)
#include <cuda_on_host.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "kernels.h"

namespace drrlhf::cuda {

#if defined(DRRLHF_EMULATED)
// Few threads, for the host takes one at a time; enough for every kind of collective.
constexpr int kLanes = 8, kThreads = 32;
#else
constexpr int kLanes = 32, kThreads = 512;
constexpr unsigned kAllLanes = 0xffffffffu;

#define DRRLHF_SHARED(Type, name) __shared__ Type name

template <class T>
__device__ T shuffle_xor(T x, int lane) {
  return __shfl_xor_sync(kAllLanes, x, lane);
}

// What went wrong, if anything did. Told to the caller, it is taken from CUDA's own record, where
// whoever asks next would find it again.
inline Failure failure_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class... P, class... A>
Failure launch_as(bool cooperative, void (*kernel)(P...), std::int64_t blocks, int threads,
                  Stream stream, A... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return failure_of(cudaLaunchKernelEx(&config, kernel, P(args)...));
}

template <class... P, class... A>
Failure launch(void (*kernel)(P...), std::int64_t blocks, int threads, Stream stream, A... args) {
  return launch_as(false, kernel, blocks, threads, stream, args...);
}

// All blocks at once on the GPU, so that they may wait for each other.
template <class... P, class... A>
Failure launch_cooperative(void (*kernel)(P...), int blocks, int threads, Stream stream,
                           A... args) {
  return launch_as(true, kernel, blocks, threads, stream, args...);
}

// 0 where the device cannot be asked.
template <class Kernel>
int blocks_at_once(Kernel kernel, int threads) {
  int device = 0, processors = 0, each = 0;
  const auto told = [](cudaError_t error) { return failure_of(error) == nullptr; };
  const bool known =
      told(cudaGetDevice(&device)) &&
      told(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) &&
      told(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0));
  return known ? processors * each : 0;
}

inline Failure clear_memory(void* data, std::int64_t bytes, Stream stream) {
  return failure_of(
      cudaMemsetAsync(data, 0, static_cast<std::size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

__device__ inline void backoff() { __nanosleep(64); }
#endif

// a b, rounded: the compiler may not make it part of a sum.
__device__ inline float multiply(float a, float b) {
#if defined(DRRLHF_EMULATED)
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}

// What another block wrote before this one was told so; past this processor's own cache.
__device__ inline double from_others(const double* x) {
#if defined(DRRLHF_EMULATED)
  return *x;
#else
  return __ldcg(x);
#endif
}

constexpr int kWarps = kThreads / kLanes;

__device__ inline float bfloat16_to_float(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties to even.
__device__ inline std::uint16_t float_to_bfloat16(float x) {
#if defined(DRRLHF_EMULATED)
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<std::uint16_t>(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16
                                           : (bits >> 16) | 0x40u);
#else
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#endif
}

__device__ inline float half_to_float(std::uint16_t x) {
#if defined(DRRLHF_EMULATED)
  return emulated_half_to_float(x);
#else
  return __half2float(__ushort_as_half(x));
#endif
}

__device__ inline std::uint16_t float_to_half(float x) {
#if defined(DRRLHF_EMULATED)
  return emulated_float_to_half(x);
#else
  return __half_as_ushort(__float2half_rn(x));
#endif
}

__device__ inline double number_at(const Numbers& x, std::int64_t i) {
  switch (x.dtype) {
    case Dtype::kFloat:
      return static_cast<const float*>(x.data)[i];
    case Dtype::kDouble:
      return static_cast<const double*>(x.data)[i];
    case Dtype::kBFloat16:
      return bfloat16_to_float(static_cast<const std::uint16_t*>(x.data)[i]);
    case Dtype::kHalf:
      return half_to_float(static_cast<const std::uint16_t*>(x.data)[i]);
    default:
      return 0.0;
  }
}

__device__ inline void put(const NumbersOut& out, std::int64_t i, double x) {
  switch (out.dtype) {
    case Dtype::kFloat:
      static_cast<float*>(out.data)[i] = static_cast<float>(x);
      break;
    case Dtype::kDouble:
      static_cast<double*>(out.data)[i] = x;
      break;
    case Dtype::kBFloat16:
      static_cast<std::uint16_t*>(out.data)[i] = float_to_bfloat16(static_cast<float>(x));
      break;
    case Dtype::kHalf:
      static_cast<std::uint16_t*>(out.data)[i] = float_to_half(static_cast<float>(x));
      break;
    default:
      break;
  }
}

__device__ inline std::int64_t integer_at(const Integers& x, std::int64_t i) {
  return x.wide ? static_cast<const std::int64_t*>(x.data)[i]
                : static_cast<const std::int32_t*>(x.data)[i];
}

}  // namespace drrlhf::cuda
