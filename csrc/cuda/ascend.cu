// What runs over weights one by one, filters aside: ascend_, SAM's step along the gradient, and restore_'s copy from a backup.
#include "ascend.h"

#include "four.h"
#include "table.h"

namespace flatops::cuda {
namespace {

constexpr int FOURS = 4;  // that a thread has on their way at once
constexpr int64_t SPAN = int64_t(FOURS) * 4 * THREADS;  // a block's elements

Work spans(const TensorList& list, DType dtype) {
  Work work;
  for (const Tensor& t : list.tensors)
    if (t.dtype == dtype && t.filters) work.add(flat(t), ceil_div(t.numel(), SPAN));
  return work;
}

// Where a thread's elements begin, and how many there are from there on; its next four lie 4 THREADS further on.
struct Place {
  int64_t start;
  int left;
  __device__ Place(const Entry& e)
      : start((blockIdx.x - e.first_block) * SPAN + 4 * threadIdx.x), left(int(min(int64_t(e.length) - start, SPAN))) {}
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
  const T* const g = (const T*)e.other + place.start;
  Four<T> x[FOURS], d[FOURS];
#pragma unroll
  for (int k = 0; k < FOURS; ++k)
    if (const int left = place.left - k * 4 * THREADS; left > 0) {
      x[k] = load(w + k * 4 * THREADS, left, e.aligned);
      d[k] = load(g + k * 4 * THREADS, left, e.aligned);
    }
  __syncthreads();
  const double step = shared_step;
  T* const backup = e.backup ? (T*)e.backup + place.start : nullptr;
#pragma unroll
  for (int k = 0; k < FOURS; ++k)
    if (const int left = place.left - k * 4 * THREADS; left > 0) {
      if (backup) store(backup + k * 4 * THREADS, x[k], left, e.aligned);
      if (step == 0) continue;  // not even 0 times an infinite gradient
#pragma unroll
      for (int c = 0; c < 4; ++c) narrow(climb(step, widen(x[k].x[c]), widen(d[k].x[c]), adaptive), x[k].x[c]);
      store(w + k * 4 * THREADS, x[k], left, e.aligned);
    }
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) copy(const __grid_constant__ Table<N> table) {
  const Entry& e = table.find(blockIdx.x);
  const Place place(e);
  T* const w = (T*)e.data + place.start;
  const T* const backup = (const T*)e.backup + place.start;
  Four<T> x[FOURS];
#pragma unroll
  for (int k = 0; k < FOURS; ++k)
    if (const int left = place.left - k * 4 * THREADS; left > 0) x[k] = load(backup + k * 4 * THREADS, left, e.aligned);
#pragma unroll
  for (int k = 0; k < FOURS; ++k)
    if (const int left = place.left - k * 4 * THREADS; left > 0) store(w + k * 4 * THREADS, x[k], left, e.aligned);
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
