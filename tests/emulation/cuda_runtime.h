// CUDA on one host thread, for tests: runs the unchanged kernels of csrc/cuda/, compiled by the host's compiler.
//
// Each thread of a block is a coroutine. It runs until a barrier or a shuffle, and continues when all threads that it
// waits for have arrived. Threads and blocks run in random order, so a race between two barriers changes bits.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx;

namespace emulation {

enum class State { ready,
                   at_warp,
                   at_block,
                   done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  bool parity = false;
};

struct Block {
  static constexpr int WARP = 32, STACK = 1 << 16;
  std::vector<Thread> threads;
  ucontext_t scheduler;
  double slots[2][1024];  // the values that threads exchange in a shuffle, and in the next one
  std::function<void()> kernel;
  std::mt19937 random{20261121};

  static Block& instance() {
    static Block block;
    return block;
  }

  Thread& current() { return threads[threadIdx.x]; }

  void wait(State state) {
    Thread& me = current();
    me.state = state;
    swapcontext(&me.context, &scheduler);
  }

  static void enter() {
    Block& block = instance();
    block.kernel();
    block.current().state = State::done;
    swapcontext(&block.current().context, &block.scheduler);
  }

  void run(unsigned count) {
    threads.resize(std::max<size_t>(threads.size(), count));
    for (unsigned i = 0; i < count; ++i) {
      Thread& t = threads[i];
      if (!t.stack) t.stack = std::make_unique<char[]>(STACK);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = STACK;
      makecontext(&t.context, enter, 0);
      t.state = State::ready;
    }
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    const auto all = [&](unsigned first, unsigned last, State state) {
      const auto in_state = [&](const Thread& t) { return t.state == state; };
      return std::all_of(threads.begin() + first, threads.begin() + last, in_state);
    };
    const auto release = [&](unsigned first, unsigned last) {
      for (unsigned i = first; i < last; ++i) threads[i].state = State::ready;
      return true;
    };
    while (!all(0, count, State::done)) {
      std::shuffle(order.begin(), order.end(), random);
      for (unsigned i : order)
        if (threads[i].state == State::ready) {
          threadIdx.x = i;
          swapcontext(&scheduler, &threads[i].context);
        }
      bool released = all(0, count, State::at_block) && release(0, count);
      for (unsigned w = 0; w < count; w += WARP)
        released |= all(w, std::min(w + WARP, count), State::at_warp) && release(w, std::min(w + WARP, count));
      if (!released && !all(0, count, State::done))
        throw std::logic_error("emulation: some threads wait for others that never arrive");
    }
  }

  void launch(unsigned blocks, unsigned count) {
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned b : order) {
      blockIdx.x = b;
      run(count);
    }
  }
};

}  // namespace emulation

// --- the part of CUDA that the kernels use ---------------------------------------------------------------------------

inline void __syncthreads() { emulation::Block::instance().wait(emulation::State::at_block); }
inline void __threadfence() {}

// The value of a lane of this warp. All lanes have to call it.
template <class T> T __shfl_sync(unsigned mask, T value, int lane) {
  auto& block = emulation::Block::instance();
  if (mask != 0xffffffffu) throw std::logic_error("emulation: only whole warps shuffle");
  const unsigned me = threadIdx.x;
  auto& slots = block.slots[block.current().parity ^= true];
  std::memcpy(&slots[me], &value, sizeof value);
  block.wait(emulation::State::at_warp);
  std::memcpy(&value, &slots[(me & ~31u) | (unsigned(lane) & 31u)], sizeof value);
  return value;
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return __shfl_sync(mask, value, int(threadIdx.x) ^ lane_mask);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, int(lane < delta ? lane : lane - delta));
}

inline uint32_t atomicAdd(uint32_t* p, uint32_t x) { return std::exchange(*p, *p + x); }
inline uint32_t atomicOr(uint32_t* p, uint32_t x) { return std::exchange(*p, *p | x); }
inline uint32_t atomicMax(uint32_t* p, uint32_t x) { return std::exchange(*p, std::max(*p, x)); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

using std::isfinite;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __int2float_rn(int x) { return float(x); }

template <class To, class From> To __bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}
inline int __float_as_int(float x) { return __bits<int>(x); }
inline int64_t __double_as_longlong(double x) { return __bits<int64_t>(x); }
inline float __int_as_float(int x) { return __bits<float>(x); }
inline float __uint_as_float(uint32_t x) { return __bits<float>(x); }

// --- the host's side -------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess,
                   cudaErrorNoKernelImageForDevice,
                   cudaErrorInvalidDeviceFunction };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "more parameters than a launch takes");
  auto& block = emulation::Block::instance();
  const std::tuple<std::decay_t<Parameters>...> parameters(arguments...);
  block.kernel = [&] { std::apply(kernel, parameters); };
  block.launch(config->gridDim.x, config->blockDim.x);
  return cudaSuccess;
}
