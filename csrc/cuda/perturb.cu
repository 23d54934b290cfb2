// perturb_, subtract_noise_ and normal_: a filter stays in registers between its norm and the addition of its noise.
#include "long_filters.h"
#include "noise.h"
#include "sum.h"

namespace flatops::cuda {
namespace {

enum class Mode { perturb,
                  subtract,
                  normal };

template <Mode MODE> struct PerturbArgs {
  std::conditional_t<MODE == Mode::perturb, float, const float>* scales;  // [list.filters]; normal: none
  const double* sigma;                                                    // perturb
  Noise noise;
  float eta;
};

__device__ float adapted(float scale, float eta, float fisher) {
  return __fdiv_rn(scale, __fsqrt_rn(__fmaf_rn(eta, fisher, 1.0f)));
}

__device__ float add(float scale, float z, float w) { return __fmaf_rn(scale, z, w); }
__device__ double add(float scale, float z, double w) { return __dadd_rn(w, __dmul_rn(double(scale), double(z))); }

// A thread's part of a block's work. VECTOR: every four is complete and aligned, which saves a branch each.
template <class T, Mode MODE, bool VECTOR>
__device__ __forceinline__ void perturb_share(const Entry& e, const Share& s, bool split, const PerturbArgs<MODE>& args) {
  __shared__ double sums[WARPS];
  const int64_t at = s.filter * e.length + s.offset;
  T* const w = (T*)e.data + at;

  Four<T> x[STEPS];
  float scale = 1.0f;
  const float* fisher = nullptr;  // if each element has its own; never with VECTOR
  if constexpr (MODE != Mode::normal) {
    load<LANES, VECTOR>(x, w, s.left);
    if (e.backup) store<LANES, VECTOR>((T*)e.backup + at, x, s.left);
    auto* const stored = args.scales + e.first_filter + s.filter;
    if (MODE == Mode::subtract || split) {
      if (s.left.elements > 0) scale = *stored;
    } else if constexpr (MODE == Mode::perturb) {
      scale = __fmul_rn(float(*args.sigma), __fsqrt_rn(float(sum_filter(x, s, sums))));
      if (s.first && s.left.elements > 0) *stored = scale;
    }
    if (MODE == Mode::subtract) scale = -scale;
    if (!VECTOR && e.other && e.one_dim) fisher = e.fisher() + s.offset;
    else if (e.other && s.left.elements > 0) scale = adapted(scale, args.eta, e.fisher()[s.filter]);
  }

  const uint64_t key = uint64_t(*args.noise.key);
  const PhiloxKeys keys = philox_keys(key);
  const PhiloxFilter filter = philox_filter(key, e.first_row + uint32_t(s.filter), e.index, uint32_t(*args.noise.draw));
  const uint32_t block = uint32_t(uint64_t(s.offset) / 4);
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    const Left left = s.left - k * LANES;
    if (left.elements <= 0) break;
    float z[4];
    normals(keys, filter, block + k * (LANES / 4), z);
    if constexpr (MODE == Mode::normal) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x[k].x[c] = z[c];
    } else {
      float scales[4] = {scale, scale, scale, scale};
      if (fisher)
#pragma unroll
        for (int c = 0; c < 4; ++c)  // reads the last one again at the end, to save a branch
          scales[c] = adapted(scale, args.eta, fisher[k * LANES + min(c, left.elements - 1)]);
#pragma unroll
      for (int c = 0; c < 4; ++c) narrow(add(scales[c], z[c], widen(x[k].x[c])), x[k].x[c]);
    }
    store<VECTOR>(w + k * LANES, x[k], left);
  }
}

template <class T, Mode MODE, int N>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 2 : 3)
    perturb(const __grid_constant__ Table<N> table, const PerturbArgs<MODE> args) {
  const Entry& e = table.find(blockIdx.x);
  const bool split = e.length > TILE;
  const Share s = share(e, blockIdx.x - e.first_block, split);
  if (e.aligned && e.length % 4 == 0 && !(e.other && e.one_dim)) perturb_share<T, MODE, true>(e, s, split, args);
  else perturb_share<T, MODE, false>(e, s, split, args);
}

template <Mode MODE> void launch_perturb(const TensorList& list, const PerturbArgs<MODE>& args, const Gpu& gpu) {
  for (DType dtype : DTYPES) {
    Work<> work;
    for (const Tensor& t : list.tensors)
      if (t.dtype == dtype && t.filters) work.add(entry(t), blocks_for(t.filters, t.length));
    if constexpr (MODE == Mode::normal)
      launch(work, gpu, [](auto n) { return perturb<float, MODE, n.value>; }, args);
    else
      by_dtype(dtype, [&]<class T>(T*) { launch(work, gpu, [](auto n) { return perturb<T, MODE, n.value>; }, args); });
  }
}

}  // namespace
}  // namespace flatops::cuda

namespace flatops {

template <>
void perturb_(TensorList& list, float* scales, const double* sigma, Noise noise, double eta, const Gpu& gpu) {
  using namespace cuda;
  long_filters(list, {.kind = Finish::scale, .out = scales, .scalar = sigma}, gpu);  // before any part of a filter changes
  launch_perturb<Mode::perturb>(list, {.scales = scales, .sigma = sigma, .noise = noise, .eta = float(eta)}, gpu);
}

template <> void subtract_noise_(TensorList& list, const float* scales, Noise noise, double eta, const Gpu& gpu) {
  cuda::launch_perturb<cuda::Mode::subtract>(list, {.scales = scales, .noise = noise, .eta = float(eta)}, gpu);
}

template <> void normal_(TensorList& list, Noise noise, const Gpu& gpu) {
  cuda::launch_perturb<cuda::Mode::normal>(list, {.noise = noise}, gpu);
}

}  // namespace flatops
