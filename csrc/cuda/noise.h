// The normals of four neighbours. Included by .cu files alone.
#pragma once
#include <cstdint>

#include "ops.h"

#define FLATOPS_INLINE __device__ __forceinline__
#define FLATOPS_UNROLL _Pragma("unroll")

namespace flatops::cuda {

// What philox.h and gaussian.h ask for: one lane.
using Word = uint32_t;
using Wide = uint64_t;
FLATOPS_INLINE Wide mul_wide(Word a, Word b) { return Wide(a) * b; }
FLATOPS_INLINE Word high(Wide x) { return Word(x >> 32); }
FLATOPS_INLINE Word low(Wide x) { return Word(x); }
FLATOPS_INLINE Word splat(uint32_t x) { return x; }

using F32 = float;
using I32 = int32_t;
FLATOPS_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FLATOPS_INLINE float sqrt_rn(float x) { return __fsqrt_rn(x); }
FLATOPS_INLINE float to_float(int32_t x) { return __int2float_rn(x); }
FLATOPS_INLINE int32_t bits(float x) { return __float_as_int(x); }
FLATOPS_INLINE float as_float(int32_t x) { return __int_as_float(x); }
FLATOPS_INLINE float select_odd(int32_t word, float if_odd, float if_even) { return word & 1 ? if_odd : if_even; }

#include "philox.h"
#include "gaussian.h"

// z[c]: the normal of offset 4 block + c.
FLATOPS_INLINE void normals(const PhiloxKeys& keys, const PhiloxFilter& filter, uint32_t block, float* z) {
  Philox<1> p;
  p.start(keys, filter, block, 0);
  p.rounds(keys, 2, 10);
  box_muller(int32_t(p.c0[0]), int32_t(p.c1[0]), z[0], z[1]);
  box_muller(int32_t(p.c2[0]), int32_t(p.c3[0]), z[2], z[3]);
}

}  // namespace flatops::cuda
