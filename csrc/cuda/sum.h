// Sums of squares in the order of all backends (reference.py: sum_squares, total). Included only by .cu files.
//
// A warp sums REDUCE elements in LANES running sums, four neighbouring ones per thread, then folds them by halves. The
// sums of several REDUCEs are added up in float64 by the same rule.
#pragma once
#include "four.h"
#include "table.h"

namespace flatops::cuda {

__device__ inline float add_square(float sum, float x) { return __fmaf_rn(x, x, sum); }
__device__ inline double add_square(double sum, double x) { return __dadd_rn(sum, __dmul_rn(x, x)); }

// The sum over a warp's REDUCE elements, or over a group's filter. All threads of the warp must call it.
template <class X> __device__ inline X fold(X (&lanes)[4], int group) {
#pragma unroll
  for (int half = WARP / 2; half >= 1; half /= 2)
    if (half < group)
#pragma unroll
      for (int c = 0; c < 4; ++c) lanes[c] += __shfl_xor_sync(0xffffffffu, lanes[c], half);
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// The sum of `term`, a function of element (k, c), over the elements of a warp or of a group of its threads.
template <class X, class Term> __device__ inline X sum_squares_of(const Share& s, const Term& term) {
  X lanes[4] = {};
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
    if (k * LANES < s.left.elements)
#pragma unroll
      for (int c = 0; c < 4; ++c) lanes[c] = add_square(lanes[c], term(k, c));
  return fold(lanes, s.group);
}
template <class T> __device__ inline Compute<T> sum_squares(const Four<T> (&x)[STEPS], const Share& s) {
  return sum_squares_of<Compute<T>>(s, [&](int k, int c) { return widen(x[k].x[c]); });
}
template <class T>
__device__ inline Compute<T> sum_squares(const Four<T> (&x)[STEPS], const Four<T> (&y)[STEPS], const Share& s) {
  return sum_squares_of<Compute<T>>(s, [&](int k, int c) { return widen(x[k].x[c]) * widen(y[k].x[c]); });
}

// The sum of squares of a block's filter. All threads of the block must call it; `sums` is shared memory.
template <class T>
__device__ inline double sum_filter(const Four<T> (&x)[STEPS], const Share& s, double (&sums)[WARPS]) {
  const double sum = sum_squares(x, s);
  if (s.warps == 1) return sum;
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  const int first = threadIdx.x / WARP & -s.warps;
  double lanes[WARPS];
#pragma unroll
  for (int i = 0; i < WARPS; ++i) lanes[i] = i < s.warps ? sums[first + i] : 0.0;
#pragma unroll
  for (int half = WARPS / 2; half >= 1; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace flatops::cuda
