// What csrc/policy_rows.cu needs of CUDA, for g++ and one thread of a CPU. The threads of a block are fibers: from one
// barrier to the next they run in a random order, each without a break, so that a missing barrier gives wrong numbers.
// A launch that fails ends there, and cudaGetLastError says why.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <utility>

#define __CUDA_ARCH__ 800  // takes the GPU's branch of what csrc writes twice
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static  // blocks run one after another

inline struct Index { unsigned x; } threadIdx, blockIdx, gridDim;

namespace cuda_on_host {

constexpr unsigned kThreads = 1024, kWarp = 32;
constexpr unsigned kMostBlocks = 3;  // fewer than the tests have rows: kernels must stride over them

enum class State { ready, at_barrier, in_shuffle, done };

struct Thread {
  ucontext_t context;
  State state;
  unsigned shuffles;  // so far
  float offered[2];   // to the last shuffles, even and odd: one may still be read while the next is offered
  alignas(16) char stack[64 * 1024];
};

inline Thread threads[kThreads];
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline std::mt19937 random_bits;
inline const char* error = nullptr;

inline void suspend(State state) {
  threads[threadIdx.x].state = state;
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

[[noreturn]] inline void fail(const char* message) {
  error = message;
  for (;;) suspend(State::done);
}

// Lets threads go on if all of them are in `state`.
inline bool release(Thread* first, unsigned count, State state) {
  const bool all = std::all_of(first, first + count, [=](const Thread& thread) { return thread.state == state; });
  if (all) std::for_each(first, first + count, [](Thread& thread) { thread.state = State::ready; });
  return all;
}

inline void run_block() {
  unsigned order[kThreads];
  for (unsigned t = 0; t < kThreads; ++t) {
    getcontext(&threads[t].context);
    threads[t].context.uc_stack = {threads[t].stack, 0, sizeof threads[t].stack};
    makecontext(&threads[t].context, [] { kernel(), suspend(State::done); }, 0);
    threads[t].state = State::ready;
    threads[t].shuffles = 0;
    order[t] = t;
  }
  for (bool released = true; released;) {
    std::shuffle(order, order + kThreads, random_bits);
    for (unsigned t : order) {
      if (threads[t].state != State::ready) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &threads[t].context);
      if (error) return;
    }
    released = release(threads, kThreads, State::at_barrier);
    for (unsigned t = 0; t < kThreads; t += kWarp) released |= release(threads + t, kWarp, State::in_shuffle);
  }
  // A thread that has returned is missing from a barrier, too.
  if (!release(threads, kThreads, State::done)) error = "threads wait for others that never come";
}

// For `entry<<<blocks, kThreads, 0, stream>>>(arguments)`.
template <class A>
void launch(void (*entry)(A), unsigned blocks, const A& arguments) {
  kernel = [=] { entry(arguments); };
  gridDim.x = std::min(blocks, kMostBlocks);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x && !error; ++blockIdx.x) run_block();
}

}  // namespace cuda_on_host

// 16 bytes that move at once, from and to multiples of 16.
template <class T>
struct alignas(16) Four {
  T x, y, z, w;
  Four() = default;
  Four(const Four& from) { *this = from; }
  void operator=(const Four& from) {
    if ((uintptr_t(this) | uintptr_t(&from)) % 16 != 0) cuda_on_host::fail("misaligned address");
    x = from.x, y = from.y, z = from.z, w = from.w;
  }
};
using uint4 = Four<uint32_t>;
using float4 = Four<float>;

template <class T>
T __ldg(const T* pointer) { return *pointer; }

[[noreturn]] inline void __trap() { cuda_on_host::fail("trap"); }
inline void __syncthreads() { cuda_on_host::suspend(cuda_on_host::State::at_barrier); }

inline float __shfl_down_sync(unsigned, float value, unsigned distance) {
  using namespace cuda_on_host;
  const unsigned turn = ++threads[threadIdx.x].shuffles % 2;
  threads[threadIdx.x].offered[turn] = value;
  suspend(State::in_shuffle);
  const bool inside = threadIdx.x % kWarp + distance < kWarp;
  return threads[threadIdx.x + (inside ? distance : 0)].offered[turn];
}

using cudaError_t = const char*;  // its message
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = nullptr;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? error : "no error"; }
