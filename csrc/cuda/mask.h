// A warp's part of a mask: REDUCE elements, 32 words, one per lane. Included only by .cu files.
//
// A lane's **flags**, for its own elements, four neighbours per step: nibble k for step k, bit c for neighbour c.
#pragma once
#include "four.h"
#include "table.h"

namespace flatops::cuda {

constexpr uint32_t WHOLE_WARP = 0xffffffffu;

struct Part {
  int64_t reduce;  // which of the tensor's
  int lane;
  int elements;    // of the REDUCE; <= 0 if there is none
  Left left;       // from the lane's first element on

  template <class E>
  __device__ Part(const E& e)
      : reduce(int64_t(blockIdx.x - e.first_block) * WARPS + threadIdx.x / WARP), lane(threadIdx.x % WARP) {
    elements = int(min(e.elements - reduce * REDUCE, REDUCE));
    left.elements = elements - 4 * lane;
    left.vector = e.aligned ? left.elements : 0;
  }

  __device__ int64_t start() const { return reduce * REDUCE + 4 * lane; }  // of the lane's elements
  __device__ int64_t word() const { return reduce * WARP + lane; }         // of the tensor's part of a mask
  __device__ bool has_word() const { return lane * 32 < elements; }

  // The bits of the lane's word that stand for elements.
  __device__ uint32_t inside() const {
    const int n = elements - lane * 32;
    return n >= 32 ? ~0u : n <= 0 ? 0u
                                  : (1u << n) - 1;
  }
};

// Eight lanes hold eight nibbles each: nibble k of lane i becomes nibble i of lane k.
__device__ inline uint32_t transpose_nibbles(uint32_t x) {
#pragma unroll
  for (int d = 1; d < 8; d *= 2) {
    const uint32_t low = d == 1 ? 0x0f0f0f0fu : d == 2 ? 0x00ff00ffu
                                                       : 0x0000ffffu;  // nibbles in whose index bit d is not set
    const uint32_t other = __shfl_xor_sync(WHOLE_WARP, x, d);
    x = threadIdx.x & d ? (x & ~low) | (other >> 4 * d & low) : (x & low) | (other << 4 * d & ~low);
  }
  return x;
}

// Word 4 k + j of a REDUCE holds nibble i of lane 8 j + i's step k.
__device__ inline uint32_t flags_of(uint32_t word) {
  const int lane = threadIdx.x % WARP;
  return transpose_nibbles(__shfl_sync(WHOLE_WARP, word, lane % 8 * 4 + lane / 8));
}
__device__ inline uint32_t word_of(uint32_t flags) {
  const int lane = threadIdx.x % WARP;
  return __shfl_sync(WHOLE_WARP, transpose_nibbles(flags), lane % 4 * 8 + lane / 4);
}

// The sum over the lanes before this one.
template <class X> __device__ inline X sum_before(X x) {
  X sum = x;
#pragma unroll
  for (int d = 1; d < WARP; d *= 2) {
    const X other = __shfl_up_sync(WHOLE_WARP, sum, d);
    if (int(threadIdx.x % WARP) >= d) sum += other;
  }
  return sum - x;
}
template <class X> __device__ inline X sum_warp(X x) {
#pragma unroll
  for (int d = WARP / 2; d >= 1; d /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, d);
  return x;
}

}  // namespace flatops::cuda
