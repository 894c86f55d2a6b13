// A stand-in for CUDA that runs the kernels of csrc/cuda on the host, for tests on machines without
// a GPU: every thread of a block is a fiber, blocks run one after the other, those of a cooperative
// launch together. Barriers and shuffles wait as they do on a device, so a collective that not all
// threads reach is found: it ends the process with a sentence.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DRRLHF_SHARED(Type, name)                       \
  static emulated::SharedMemory<Type> name##_of_blocks; \
  Type& name = name##_of_blocks.of[emulated::machine.running->block]

using std::max;
using std::min;

struct dim3 {
  unsigned x, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulated {

constexpr int kLanesOfWarp = 8;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  unsigned block, thread;
  bool done = false;
};

struct Meeting {  // of a block or a warp
  int arrived = 0;
  std::uint64_t generation = 0;
};

struct Memory {
  void* data;
  std::size_t bytes;

  // Shared memory is anything when a block begins; as a floating number these bits are NaN.
  void spoil() const { std::memset(data, 0xff, bytes); }
};

struct Machine {
  std::vector<Memory> shared;  // of every kernel that has run
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> blocks, warps;
  std::vector<std::uint64_t> mail;  // what each thread shows to its warp
  ucontext_t scheduler;
  Fiber* running = nullptr;
  std::function<void()> body;
  int threads = 0, idle = 0;
};

inline Machine machine;
inline std::mutex one_kernel_at_a_time;

// Blocks that run together have a copy each.
template <class Type>
struct SharedMemory {
  Type of[8];

  SharedMemory() {
    machine.shared.push_back({of, sizeof of});
    machine.shared.back().spoil();
  }
};

inline void enter() {
  machine.body();
  machine.running->done = true;
  swapcontext(&machine.running->context, &machine.scheduler);
}

inline void yield() { swapcontext(&machine.running->context, &machine.scheduler); }

inline void wait(Meeting& meeting, int expected) {
  const std::uint64_t generation = meeting.generation;
  machine.idle = 0;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  while (meeting.generation == generation) {
    ++machine.idle;
    yield();
  }
  machine.idle = 0;
}

inline int slot() {
  return static_cast<int>(machine.running->block) * machine.threads +
         static_cast<int>(machine.running->thread);
}

// The blocks first .. first + count - 1 at once.
inline void run_blocks(unsigned first, unsigned count, int threads) {
  machine.threads = threads;
  machine.blocks.assign(count, {});
  machine.warps.assign(count * threads / kLanesOfWarp, {});
  machine.mail.assign(count * threads, 0);
  for (const Memory& memory : machine.shared) memory.spoil();
  while (machine.fibers.size() < std::size_t(count) * threads) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    machine.fibers.back()->stack.resize(64 * 1024);
  }
  int left = 0;
  for (unsigned b = 0; b < count; ++b) {
    for (int t = 0; t < threads; ++t, ++left) {
      Fiber& fiber = *machine.fibers[left];
      fiber.block = b;
      fiber.thread = t;
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &machine.scheduler;
      makecontext(&fiber.context, enter, 0);
    }
  }
  const int total = left;
  while (left > 0) {
    for (int i = 0; i < total; ++i) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.done) continue;
      machine.running = &fiber;
      threadIdx.x = fiber.thread;
      blockIdx.x = first + fiber.block;
      swapcontext(&machine.scheduler, &fiber.context);
      if (fiber.done) --left;
    }
    if (machine.idle > 1000000) {
      std::fprintf(stderr, "emulated CUDA: threads wait for others that do not come\n");
      std::abort();
    }
  }
}

template <class... P, class... A>
const char* run(void (*kernel)(P...), unsigned blocks, int threads, bool together, A... args) {
  const std::lock_guard<std::mutex> lock(one_kernel_at_a_time);
  gridDim.x = blocks;
  blockDim.x = threads;
  machine.body = [=] { kernel(args...); };
  if (together) {
    run_blocks(0, blocks, threads);
  } else {
    for (unsigned b = 0; b < blocks; ++b) run_blocks(b, 1, threads);
  }
  return nullptr;
}

}  // namespace emulated

inline void __syncthreads() {
  auto& m = emulated::machine;
  emulated::wait(m.blocks[m.running->block], m.threads);
}

inline void __syncwarp() {
  auto& m = emulated::machine;
  emulated::wait(m.warps[emulated::slot() / emulated::kLanesOfWarp], emulated::kLanesOfWarp);
}

inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* at, unsigned x) {
  const unsigned before = *at;
  *at += x;
  return before;
}

namespace drrlhf {

template <class T>
T shuffle_xor(T x, int lane) {
  auto& m = emulated::machine;
  const int mine = emulated::slot();
  static_assert(sizeof(T) <= sizeof m.mail[0]);
  std::memcpy(&m.mail[mine], &x, sizeof x);
  __syncwarp();
  T other;
  std::memcpy(&other, &m.mail[mine ^ lane], sizeof other);
  __syncwarp();
  return other;
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), std::int64_t blocks, int threads, void*, A... args) {
  return emulated::run(kernel, static_cast<unsigned>(blocks), threads, false, args...);
}

template <class... P, class... A>
const char* launch_cooperative(void (*kernel)(P...), int blocks, int threads, void*, A... args) {
  return emulated::run(kernel, static_cast<unsigned>(blocks), threads, true, args...);
}

template <class Kernel>
int blocks_at_once(Kernel, int) {
  return 3;
}

inline const char* clear_memory(void* data, std::int64_t bytes, void*) {
  std::memset(data, 0, static_cast<std::size_t>(bytes));
  return nullptr;
}

inline void backoff() { emulated::yield(); }

inline float emulated_half_to_float(std::uint16_t x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return half;
}

inline std::uint16_t emulated_float_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  std::uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

}  // namespace drrlhf
