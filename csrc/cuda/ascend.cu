// What runs over weights one by one, filters aside: ascend_, SAM's step along the gradient, and restore_'s copy from a backup.
#include "ascend.h"

#include "four.h"
#include "table.h"

namespace flatops::cuda {
namespace {

constexpr int FOURS = 4, STEP = 4 * THREADS;  // a thread has FOURS fours on their way at once, STEP apart
constexpr int64_t SPAN = FOURS * STEP;        // a block's elements

Work spans(const TensorList& list, DType dtype) {
  Work work;
  for (const Tensor& t : list.tensors)
    if (t.dtype == dtype && t.filters) work.add(flat(t), ceil_div(t.numel(), SPAN));
  return work;
}

// Where a thread's elements begin, and what is left from there on.
struct Place {
  int64_t start;
  Left left;
  __device__ Place(const Entry& e) : start(int64_t(blockIdx.x - e.first_block) * SPAN + 4 * threadIdx.x) {
    left.elements = int(min(int64_t(e.length) - start, SPAN));
    left.vector = e.aligned ? left.elements : 0;
  }
};

__device__ float climb(double step, float w, float g, bool adaptive) {
  return __fmaf_rn(float(step), adaptive ? __fmul_rn(__fmul_rn(w, w), g) : g, w);
}
__device__ double climb(double step, double w, double g, bool adaptive) {
  return __dadd_rn(w, __dmul_rn(step, adaptive ? __dmul_rn(__dmul_rn(w, w), g) : g));
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    ascend(const __grid_constant__ Table<N> table, const double* const rho, const double* const norm, const bool adaptive) {
  __shared__ double shared_step;
  if (threadIdx.x == 0)  // a division in float64 is dear
    shared_step = *norm > 0 && isfinite(*norm) ? __ddiv_rn(*rho, *norm) : 0.0;
  const Entry& e = table.find(blockIdx.x);
  const Place place(e);
  T* const w = (T*)e.data + place.start;
  Four<T> x[FOURS], g[FOURS];
  load<STEP>(x, w, place.left);
  load<STEP>(g, (const T*)e.other + place.start, place.left);
  __syncthreads();
  const double step = shared_step;
  if (e.backup) store<STEP>((T*)e.backup + place.start, x, place.left);
  if (step == 0) return;  // not even 0 times an infinite gradient
#pragma unroll
  for (int k = 0; k < FOURS; ++k)
#pragma unroll
    for (int c = 0; c < 4; ++c) narrow(climb(step, widen(x[k].x[c]), widen(g[k].x[c]), adaptive), x[k].x[c]);
  store<STEP>(w, x, place.left);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) copy(const __grid_constant__ Table<N> table) {
  const Entry& e = table.find(blockIdx.x);
  const Place place(e);
  Four<T> x[FOURS];
  load<STEP>(x, (const T*)e.backup + place.start, place.left);
  store<STEP>((T*)e.data + place.start, x, place.left);
}

}  // namespace

void copy_back(const TensorList& list, const Gpu& gpu) {
  for (DType dtype : DTYPES)
    by_dtype(dtype, [&]<class T>(T*) { launch(spans(list, dtype), gpu, [](auto n) { return copy<T, n.value>; }); });
}

}  // namespace flatops::cuda

namespace flatops {

template <> void ascend_(TensorList& list, const double* rho, const double* norm, bool adaptive, const Gpu& gpu) {
  using namespace cuda;
  for (DType dtype : DTYPES)
    by_dtype(dtype, [&]<class T>(T*) {
      launch(spans(list, dtype), gpu, [](auto n) { return ascend<T, n.value>; }, rho, norm, adaptive);
    });
}

}  // namespace flatops
