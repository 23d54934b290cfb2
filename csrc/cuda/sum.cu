// Sums of squares per filter and over the whole list: filter_norms, filter_fisher_, grad_norm, norms of long filters.
#include "sum.h"

#include "long_filters.h"

namespace flatops::cuda {
namespace {

__device__ void update(float& fisher, double sum, const Finish& finish) {
  const double added = __dmul_rn(__dmul_rn(*finish.scalar, *finish.scalar), sum);
  if (isfinite(added)) fisher = float(__dadd_rn(__dmul_rn(finish.beta, fisher), added));
}

__device__ void finish_filter(const Entry& e, int64_t filter, double sum, const Finish& finish) {
  if (finish.kind == Finish::fisher) return update(((float*)e.other)[filter], sum, finish);
  const float norm = __fsqrt_rn(float(sum));
  finish.out[e.first_filter + filter] = finish.kind == Finish::norm ? norm : __fmul_rn(float(*finish.scalar), norm);
}

// Filters that are not long. In the Fisher, a one-dimensional tensor has one number per element instead.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) filter_sums(const __grid_constant__ Table<N> table, const Finish finish) {
  __shared__ double sums[WARPS];
  const Entry& e = table.find(blockIdx.x);
  const bool each = finish.kind == Finish::fisher && e.one_dim;
  const Share s = share(e, blockIdx.x - e.first_block, each);
  Four<T> x[STEPS];
  load<LANES>(x, (const T*)e.data + s.filter * e.length + s.offset, s.left);
  if (each) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (k * LANES + c < s.left.elements) {
          const double g = widen(x[k].x[c]);
          update(((float*)e.other)[s.offset + k * LANES + c], __dmul_rn(g, g), finish);
        }
    return;
  }
  const double sum = sum_filter(x, s, sums);
  if (s.first && s.left.elements > 0) finish_filter(e, s.filter, sum, finish);
}

// The sums of n REDUCEs take this much memory: twice their size, since total needs as much again.
__host__ __device__ int64_t room(int64_t reduces) { return reduces + ceil_div(reduces, REDUCE); }

// The sums of each REDUCE of filters split over blocks; with PRODUCT, of (w g)^2. Clears the ticket for fold.
template <class T, bool PRODUCT, int N>
__global__ void __launch_bounds__(THREADS)
    part_sums(const __grid_constant__ Table<N> table, double* const sums, uint32_t* const ticket) {
  if (ticket && blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
  const Entry& e = table.find(blockIdx.x);
  const Share s = share(e, blockIdx.x - e.first_block, true);
  const int64_t at = s.filter * e.length + s.offset;
  Four<T> x[STEPS], y[STEPS];
  load<LANES>(x, (const T*)e.data + at, s.left);
  if (PRODUCT) load<LANES>(y, (const T*)e.other + at, s.left);
  const double sum = PRODUCT ? sum_squares(x, y, s) : sum_squares(x, s);
  if (threadIdx.x % WARP == 0 && s.left.elements > 0)
    sums[e.index + s.filter * room(ceil_div(e.length, REDUCE)) + s.offset / REDUCE] = sum;
}

// Adds up n sums, REDUCE by REDUCE, back and forth between `sums` and the memory after them. All threads must call it.
__device__ double total(double* sums, int64_t n) {
  double* from = sums;
  double* to = sums + n;
  while (n > 1) {
    const int64_t groups = ceil_div(n, REDUCE);
    for (int64_t g = threadIdx.x / WARP; g < groups; g += WARPS) {
      const int64_t end = min(n, (g + 1) * REDUCE);
      double lanes[4] = {};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        for (int64_t i = g * REDUCE + threadIdx.x % WARP + c * WARP; i < end; i += LANES) lanes[c] += from[i];
      double sum = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
#pragma unroll
      for (int half = WARP / 2; half >= 1; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
      if (threadIdx.x % WARP == 0) to[g] = sum;
    }
    __syncthreads();
    double* const next = from;
    from = to, to = next, n = groups;
  }
  return n ? from[0] : 0.0;
}

// One block per filter: adds up the sums of its parts and finishes the filter.
template <int N>
__global__ void __launch_bounds__(THREADS)
    fold_filters(const __grid_constant__ Table<N> table, double* const sums, const Finish finish) {
  const Entry& e = table.find(blockIdx.x);
  const int64_t filter = blockIdx.x - e.first_block, reduces = ceil_div(e.length, REDUCE);
  const double sum = total(sums + e.index + filter * room(reduces), reduces);
  if (threadIdx.x == 0) finish_filter(e, filter, sum, finish);
}

// One block per tensor; the last block to finish adds up the tensors.
template <int N>
__global__ void __launch_bounds__(THREADS)
    fold_tensors(const __grid_constant__ Table<N> table, double* const sums, double* const tensor_sums, uint32_t* const ticket,
                 const uint32_t tensors, double* const norm) {
  __shared__ bool last;
  const Entry& e = table.find(blockIdx.x);
  const double sum = total(sums + e.index, ceil_div(e.length, REDUCE));
  if (threadIdx.x == 0) {
    tensor_sums[e.first_filter] = sum;
    __threadfence();
    last = atomicAdd(ticket, 1u) == tensors - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const double square = total(tensor_sums, tensors);
  if (threadIdx.x == 0) *norm = __dsqrt_rn(square);
}

// Launches part_sums for the entries of one dtype.
template <class T> void launch_part_sums(const Work<>& work, bool product, double* sums, uint32_t* ticket, const Gpu& gpu) {
  if (product) launch(work, gpu, [](auto n) { return part_sums<T, true, n.value>; }, sums, ticket);
  else launch(work, gpu, [](auto n) { return part_sums<T, false, n.value>; }, sums, ticket);
}

}  // namespace

void long_filters(const TensorList& list, const Finish& finish, const Gpu& gpu) {
  Work<> parts[std::size(DTYPES)], all;
  int64_t sums = 0;
  for (const Tensor& t : list.tensors) {
    if (!t.filters || t.length <= TILE || (finish.kind == Finish::fisher && t.one_dim)) continue;
    Entry e = entry(t);
    e.index = uint32_t(sums);
    sums += t.filters * room(ceil_div(t.length, REDUCE));
    parts[int(t.dtype)].add(e, blocks_for(t.filters, t.length));
    all.add(e, t.filters);
  }
  if (!sums) return;
  double* const scratch = (double*)gpu.scratch(sums * sizeof(double));
  for (DType dtype : DTYPES)
    by_dtype(dtype, [&]<class T>(T*) { launch_part_sums<T>(parts[int(dtype)], false, scratch, nullptr, gpu); });
  launch(all, gpu, [](auto n) { return fold_filters<n.value>; }, scratch, finish);
}

static void finish_filters(const TensorList& list, const Finish& finish, const Gpu& gpu) {
  for (DType dtype : DTYPES) {
    Work<> work;
    for (const Tensor& t : list.tensors) {
      if (t.dtype != dtype || !t.filters) continue;
      if (finish.kind == Finish::fisher && t.one_dim) work.add(entry(t), ceil_div(t.length, TILE));
      else if (t.length <= TILE) work.add(entry(t), blocks_for(t.filters, t.length));
    }
    by_dtype(dtype, [&]<class T>(T*) { launch(work, gpu, [](auto n) { return filter_sums<T, n.value>; }, finish); });
  }
  long_filters(list, finish, gpu);
}

}  // namespace flatops::cuda

namespace flatops {

template <> void filter_norms(TensorList& list, float* out, const Gpu& gpu) {
  cuda::finish_filters(list, {.kind = cuda::Finish::norm, .out = out}, gpu);
}

template <> void filter_fisher_(TensorList& list, double beta, const double* scale, const Gpu& gpu) {
  cuda::finish_filters(list, {.kind = cuda::Finish::fisher, .scalar = scale, .beta = beta}, gpu);
}

template <> void grad_norm(TensorList& list, bool adaptive, double* out, const Gpu& gpu) {
  using namespace cuda;
  Work<> parts[std::size(DTYPES)], all;
  int64_t sums = 0;
  for (size_t i = 0; i < list.tensors.size(); ++i) {
    const Tensor& t = list.tensors[i];
    Entry e = flat(t);
    e.index = uint32_t(sums);
    e.first_filter = uint32_t(i);
    const int64_t reduces = ceil_div(t.numel(), REDUCE);
    sums += room(reduces);
    parts[int(t.dtype)].add(e, std::max<int64_t>(1, ceil_div(t.numel(), TILE)));  // 1: one block must clear the ticket
    all.add(e, 1);
  }
  const int64_t tensors = int64_t(list.tensors.size());
  double* const scratch = (double*)gpu.scratch((sums + room(tensors) + 1) * sizeof(double));
  double* const tensor_sums = scratch + sums;
  uint32_t* const ticket = (uint32_t*)(tensor_sums + room(tensors));
  for (DType dtype : DTYPES)
    by_dtype(dtype, [&]<class T>(T*) { launch_part_sums<T>(parts[int(dtype)], adaptive, scratch, ticket, gpu); });
  launch(all, gpu, [](auto n) { return fold_tensors<n.value>; }, scratch, tensor_sums, ticket, uint32_t(tensors), out);
}

}  // namespace flatops
