// The team of csrc/core/team.h as the threads of one block, or of a whole cooperative grid.
//
// A reduction is a butterfly of shuffles in each warp, then of the warps' partial results, which
// every warp adds up by itself: all threads hold the same bits after one barrier. Sums are taken in
// an order that depends on n and the shape of the launch alone.
#pragma once

#include "device.h"

namespace drrlhf::cuda {

// What a grid waits by; in global memory, zero before the launch.
struct GridBarrier {
  unsigned arrived, released;
};

struct Add {
  __device__ static double neutral() { return 0.0; }
  __device__ static double of(double a, double b) { return a + b; }
};

struct Larger {
  __device__ static double neutral() { return -kInfinity; }
  __device__ static double of(double a, double b) { return a > b ? a : b; }
};

template <class Operation, int K>
__device__ void reduce_lanes(Sums<K>& x, int width) {
  for (int lane = width / 2; lane > 0; lane /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) x.v[k] = Operation::of(x.v[k], shuffle_xor(x.v[k], lane));
  }
}

constexpr int kMostSums = 4;

// In shared memory: two buffers, so that one barrier between filling one and reading it is enough.
struct Partials {
  double of[2][kWarps][kMostSums];
};

// A block of kThreads threads.
struct BlockReduce {
  Partials* partials;
  mutable int parity;

  template <class Operation, int K>
  __device__ Sums<K> reduce(Sums<K> x) const {
    static_assert(K <= kMostSums);
    const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
    reduce_lanes<Operation, K>(x, kLanes);
    double (&buffer)[kWarps][kMostSums] = partials->of[parity];
    parity ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) buffer[warp][k] = x.v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) x.v[k] = buffer[lane % kWarps][k];
    reduce_lanes<Operation, K>(x, kWarps);
    return x;
  }
};

template <bool kGrid>
struct DeviceTeam {
  std::int64_t n;
  BlockReduce block;
  GridBarrier* barrier;   // of a grid alone
  double* grid_partials;  // [2][blocks][kMostSums]
  mutable int grid_parity;
  mutable unsigned crossed;  // barriers of the grid so far

  __device__ std::int64_t rank() const {
    return kGrid ? std::int64_t(blockIdx.x) * kThreads + threadIdx.x : threadIdx.x;
  }
  __device__ std::int64_t size() const {
    return kGrid ? std::int64_t(gridDim.x) * kThreads : kThreads;
  }

  // Everyone arrives, and sees what everyone wrote.
  __device__ void meet() const {
    if constexpr (kGrid) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        volatile unsigned* released = &barrier->released;
        if (atomicAdd(&barrier->arrived, 1u) + 1 == (crossed + 1) * gridDim.x) {
          *released = crossed + 1;
        } else {
          while (*released <= crossed) backoff();
        }
        __threadfence();
      }
      ++crossed;
    }
    __syncthreads();
  }

  template <class Operation, int K>
  __device__ Sums<K> reduce(Sums<K> x) const {
    x = block.template reduce<Operation, K>(x);
    if constexpr (kGrid) {
      double* mine = grid_partials + std::int64_t(grid_parity) * gridDim.x * kMostSums;
      grid_parity ^= 1;
      volatile double* slots = mine;
      if (threadIdx.x == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) slots[blockIdx.x * kMostSums + k] = x.v[k];
      }
      meet();
      for (int k = 0; k < K; ++k) x.v[k] = Operation::neutral();
      for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
#pragma unroll
        for (int k = 0; k < K; ++k) x.v[k] = Operation::of(x.v[k], slots[b * kMostSums + k]);
      }
      x = block.template reduce<Operation, K>(x);
    }
    return x;
  }

  template <class Operation, int K, class F>
  __device__ Sums<K> gather(F f) const {
    Sums<K> total;
#pragma unroll
    for (int k = 0; k < K; ++k) total.v[k] = Operation::neutral();
    for (std::int64_t i = rank(); i < n; i += size()) {
      const Sums<K> term = f(i);
#pragma unroll
      for (int k = 0; k < K; ++k) total.v[k] = Operation::of(total.v[k], term.v[k]);
    }
    return reduce<Operation, K>(total);
  }

  template <int K, class F>
  __device__ Sums<K> sum(F f) const {
    return gather<Add, K>(f);
  }

  template <int K, class F>
  __device__ Sums<K> max(F f) const {
    return gather<Larger, K>(f);
  }

  template <class F>
  __device__ void each(F f) const {
    for (std::int64_t i = rank(); i < n; i += size()) f(i);
  }

  // A warp for each slot, so that the sum has one order.
  template <class S, class F>
  __device__ void scatter(double* out, int slots, S slot, F f) const {
    meet();
    const int lane = threadIdx.x % kLanes;
    for (std::int64_t g = rank() / kLanes; g < slots; g += size() / kLanes) {
      Sums<1> total = {{0.0}};
      for (std::int64_t i = lane; i < n; i += kLanes) total.v[0] += slot(i) == g ? f(i) : 0.0;
      reduce_lanes<Add, 1>(total, kLanes);
      if (lane == 0) out[g] = total.v[0];
    }
    meet();
  }

  template <class F>
  __device__ void one(F f) const {
    meet();
    if (rank() == 0) f();
    meet();
  }
};

}  // namespace drrlhf::cuda
