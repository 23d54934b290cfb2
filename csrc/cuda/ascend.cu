// Operators on single elements: ascend_, SAM's ascent, and restore_, the copy from a backup, both also under a mask;
// fisher_.
#include "four.h"
#include "mask.h"
#include "table.h"

namespace flatops::cuda {
namespace {

constexpr int FOURS = 4, STEP = 4 * THREADS;  // a thread loads FOURS fours at once, STEP apart
constexpr int64_t SPAN = FOURS * STEP;        // elements per block

Work<> spans(const TensorList& list, DType dtype) {
  Work<> work;
  for (const Tensor& t : list.tensors)
    if (t.dtype == dtype && t.filters) work.add(flat(t), ceil_div(t.numel(), SPAN));
  return work;
}

// Where a thread's elements begin, and how many elements are left from there on.
struct Place {
  int64_t start;
  Left left;
  __device__ Place(const Entry& e) : start(int64_t(blockIdx.x - e.first_block) * SPAN + 4 * threadIdx.x) {
    left.elements = int(min(e.length - start, SPAN));
    left.vector = e.aligned ? left.elements : 0;
  }
};

__device__ float climb(double step, float w, float g, bool adaptive) {
  return __fmaf_rn(float(step), adaptive ? __fmul_rn(__fmul_rn(w, w), g) : g, w);
}
__device__ double climb(double step, double w, double g, bool adaptive) {
  return __dadd_rn(w, __dmul_rn(step, adaptive ? __dmul_rn(__dmul_rn(w, w), g) : g));
}

__device__ double step_of(const double* rho, const double* norm) {
  return *norm > 0 && isfinite(*norm) ? __ddiv_rn(*rho, *norm) : 0.0;
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    ascend(const __grid_constant__ Table<N> table, const double* const rho, const double* const norm, const bool adaptive) {
  __shared__ double shared_step;
  if (threadIdx.x == 0) shared_step = step_of(rho, norm);  // a float64 division is slow
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

// F += (scale g)^2
template <int N>
__global__ void __launch_bounds__(THREADS) add_squares(const __grid_constant__ Table<N> table, const double* const scale) {
  const Entry& e = table.find(blockIdx.x);
  const Place place(e);
  float* const f = (float*)e.data + place.start;
  const float s = float(*scale);
  Four<float> x[FOURS], g[FOURS];
  load<STEP>(x, f, place.left);
  load<STEP>(g, (const float*)e.other + place.start, place.left);
#pragma unroll
  for (int k = 0; k < FOURS; ++k)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float d = __fmul_rn(s, g[k].x[c]);
      x[k].x[c] = __fmaf_rn(d, d, x[k].x[c]);
    }
  store<STEP>(f, x, place.left);
}

// --- under a mask: a warp takes a REDUCE, and only fours with a selected element are read and written ----------------

// A tensor as one row of elements.
struct MaskedEntry {
  void* data;
  const void* grad;     // or null
  int64_t elements;
  uint32_t first_word;  // of the tensor, in the mask
  uint32_t first_rank;
  uint32_t first_block;
  bool aligned;         // four neighbours can be moved at once
};
template <int N> using MaskedTable = Table<N, MaskedEntry>;

struct Mask {
  const uint32_t* words;
  const uint32_t* ranks;
  MaskedBackup backup;
};

// The selected (live) elements of a warp's REDUCE, and their slots.
struct Live {
  uint32_t word, before;  // the lane's word; the number of ones before it
  uint32_t flags;         // of the lane's own elements
  char* slots;            // from that of the REDUCE's first selected element on

  // False if there is nothing to do: no live element, or no slots for them in the backup.
  __device__ bool find(const MaskedEntry& e, const Part& part, const Mask& mask) {
    const uint32_t ones = __popc(word);
    before = sum_before(ones);
    const uint32_t count = __shfl_sync(WHOLE_WARP, before + ones, WARP - 1);
    if (!count) return false;
    if (mask.backup.data) {
      const int64_t rank = mask.ranks[e.first_rank + part.reduce];
      if (rank + count > mask.backup.slots) return false;
      slots = (char*)mask.backup.data + rank * mask.backup.width;
    }
    flags = flags_of(word);
    return true;
  }

  // Calls f(neighbour, slot) for the live ones of step k.
  template <class T, class F> __device__ void each_slot(int k, int64_t width, const F& f) const {
    const int lane = threadIdx.x % WARP, from = 4 * k + lane / 8;
    const uint32_t w = __shfl_sync(WHOLE_WARP, word, from), first = __shfl_sync(WHOLE_WARP, before, from);
    const uint32_t mine = flags >> 4 * k & 15;
    T* at[4];
    uint32_t n = first + __popc(w & ((1u << lane % 8 * 4) - 1));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      at[c] = (T*)(slots + n * width);
      n += mine >> c & 1;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (mine >> c & 1) f(c, *at[c]);
  }
};

// The fours with a live element of a warp's REDUCE, FOURS of them from step `first` on.
template <class T> __device__ void load_live(Four<T> (&x)[FOURS], const T* p, uint32_t flags, int first, Left left) {
#pragma unroll
  for (int k = 0; k < FOURS; ++k)
    if (flags >> 4 * (first + k) & 15) x[k] = load(p + (first + k) * LANES, left - (first + k) * int(LANES));
}
template <class T> __device__ void store_live(T* p, const Four<T> (&x)[FOURS], uint32_t flags, int first, Left left) {
#pragma unroll
  for (int k = 0; k < FOURS; ++k)
    if (flags >> 4 * (first + k) & 15) store(p + (first + k) * LANES, x[k], left - (first + k) * int(LANES));
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    ascend_masked(const __grid_constant__ MaskedTable<N> table, const Mask mask, const double* const rho, const double* const norm,
                  const bool adaptive) {
  __shared__ double shared_step;
  if (threadIdx.x == 0) shared_step = step_of(rho, norm);
  const MaskedEntry& e = table.find(blockIdx.x);
  const Part part(e);
  Live live;
  live.word = part.has_word() ? mask.words[e.first_word + part.word()] & part.inside() : 0;
  __syncthreads();
  const double step = shared_step;
  if (!live.find(e, part, mask)) return;
  T* const w = (T*)e.data + part.start();
  const T* const d = (const T*)e.grad + part.start();
#pragma unroll 1
  for (int first = 0; first < STEPS; first += FOURS) {
    Four<T> x[FOURS], g[FOURS];
    load_live(x, w, live.flags, first, part.left);
    if (step != 0) load_live(g, d, live.flags, first, part.left);
    if (mask.backup.data)
#pragma unroll
      for (int k = 0; k < FOURS; ++k)
        live.each_slot<T>(first + k, mask.backup.width, [&](int c, T& slot) { slot = x[k].x[c]; });
    if (step == 0) continue;  // not even 0 times an infinite gradient
#pragma unroll
    for (int k = 0; k < FOURS; ++k)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (live.flags >> (4 * (first + k) + c) & 1)
          narrow(climb(step, widen(x[k].x[c]), widen(g[k].x[c]), adaptive), x[k].x[c]);
    store_live(w, x, live.flags, first, part.left);  // dead elements keep their bits
  }
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) restore_masked(const __grid_constant__ MaskedTable<N> table, const Mask mask) {
  const MaskedEntry& e = table.find(blockIdx.x);
  const Part part(e);
  Live live;
  live.word = part.has_word() ? mask.words[e.first_word + part.word()] & part.inside() : 0;
  if (!live.find(e, part, mask)) return;
  T* const w = (T*)e.data + part.start();
#pragma unroll 1
  for (int first = 0; first < STEPS; first += FOURS) {
    Four<T> x[FOURS];
    load_live(x, w, live.flags, first, part.left);
#pragma unroll
    for (int k = 0; k < FOURS; ++k)
      live.each_slot<T>(first + k, mask.backup.width, [&](int c, T& slot) { x[k].x[c] = slot; });
    store_live(w, x, live.flags, first, part.left);
  }
}

Mask mask_of(const TensorList& list) {
  return {.words = list.tensors[0].bits, .ranks = list.tensors[0].ranks, .backup = list.masked_backup};
}

Work<MaskedEntry> reduces(const TensorList& list, DType dtype) {
  const Mask mask = mask_of(list);
  Work<MaskedEntry> work;
  for (const Tensor& t : list.tensors)
    if (t.dtype == dtype && t.filters)
      work.add({.data = t.data, .grad = t.grad, .elements = t.numel(), .first_word = uint32_t(t.bits - mask.words), .first_rank = uint32_t(t.ranks - mask.ranks), .aligned = are_aligned(dtype, {t.data, t.grad})},
               ceil_div(t.numel(), TILE));
  return work;
}

}  // namespace
}  // namespace flatops::cuda

namespace flatops {

template <> void ascend_(TensorList& list, const double* rho, const double* norm, bool adaptive, const Gpu& gpu) {
  using namespace cuda;
  for (DType dtype : DTYPES)
    by_dtype(dtype, [&]<class T>(T*) {
      if (list.masked())
        launch(reduces(list, dtype), gpu, [](auto n) { return ascend_masked<T, n.value>; }, mask_of(list), rho, norm, adaptive);
      else
        launch(spans(list, dtype), gpu, [](auto n) { return ascend<T, n.value>; }, rho, norm, adaptive);
    });
}

template <> void restore_(TensorList& list, const Gpu& gpu) {
  using namespace cuda;
  for (DType dtype : DTYPES)
    by_dtype(dtype, [&]<class T>(T*) {
      if (list.masked())
        launch(reduces(list, dtype), gpu, [](auto n) { return restore_masked<T, n.value>; }, mask_of(list));
      else
        launch(spans(list, dtype), gpu, [](auto n) { return copy<T, n.value>; });
    });
}

template <> void fisher_(TensorList& list, const double* scale, const Gpu& gpu) {
  using namespace cuda;
  launch(spans(list, DType::f32), gpu, [](auto n) { return add_squares<n.value>; }, scale);
}

}  // namespace flatops
