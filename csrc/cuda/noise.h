// The normals of four neighbours. Included only by .cu files.
#pragma once
#include <cstdint>

#include "ops.h"

#define FLATOPS_INLINE __device__ __forceinline__
#define FLATOPS_UNROLL _Pragma("unroll")

namespace flatops::cuda {

// One lane, for philox.h and gaussian.h.
using Word = uint32_t;
using Wide = uint64_t;
FLATOPS_INLINE Wide mul_wide(Word a, Word b) { return Wide(a) * b; }
FLATOPS_INLINE Word high(Wide x) { return Word(x >> 32); }
FLATOPS_INLINE Word low(Wide x) { return Word(x); }
FLATOPS_INLINE Word splat(uint32_t x) { return x; }

FLATOPS_INLINE float rsqrt_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / __fsqrt_rn(x);
#endif
}

using F32 = float;
using I32 = int32_t;
FLATOPS_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FLATOPS_INLINE float sqrt_rn(float x) {
  // __fsqrt_rn without its branch for very small and very large numbers: here x is zero, of either sign, or lies
  // between 1e-7 and 44. The reciprocal root of zero is infinite.
  const float y = fminf(fabsf(rsqrt_approx(x)), 1e19f), root = x * y;
  return __fmaf_rn(__fmaf_rn(-root, root, x), 0.5f * y, root);
}
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
