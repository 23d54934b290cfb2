// perturb_, subtract_noise_, normal_: a filter's norm, its normals and the addition, while it is in the cache.
#define FLATOPS_FILE "cpu/perturb.cpp"
#ifndef FLATOPS_LEVEL
#include "ops.h"

namespace flatops::cpu {
struct PerturbArgs {
  const float* scales;       // [list.filters]
  float* new_scales = {};    // perturb_: the same, to write for filters in one block; null: subtract
  const double* sigma = {};
  Noise noise;
  double eta;
};
}  // namespace flatops::cpu
#endif
#include "cpu/each_level.h"

#ifdef FLATOPS_LEVEL

constexpr int64_t AHEAD = 2048;  // prefetch at least so many elements: the next filters, during this one

// w += scale z; scale is one number, or with `scales` one per element.
template <bool EACH>
FLATOPS_INLINE void add(float* w, const float* z, float scale, const float* scales, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    store(w + i, fma(EACH ? load<F32>(scales + i) : F32{} + scale, load<F32>(z + i), load<F32>(w + i)));
  for (; i < n; ++i) w[i] = __builtin_fmaf(EACH ? scales[i] : scale, z[i], w[i]);
}
template <bool EACH>
FLATOPS_INLINE void add(double* w, const float* z, float scale, const float* scales, int64_t n) {
  for (int64_t i = 0; i < n; ++i) w[i] += double(EACH ? scales[i] : scale) * double(z[i]);
}

FLATOPS_INLINE float adapted(float scale, double eta, float fisher) {
  return scale / std::sqrt(__builtin_fmaf(float(eta), fisher, 1.0f));
}

template <class T>
static void perturb_block_of(const Tensor& t, const Block& b, const Draws& draws, const PerturbArgs& args) {
  Tile z, room, scales;
  const int64_t ahead = std::max(b.length, AHEAD);
  for (int64_t f = b.filter; f < b.filter + b.filters; ++f) {
    T* w = (T*)t.data + f * t.length + b.start;
    T* backup = t.backup ? (T*)t.backup + f * t.length + b.start : nullptr;
    const int64_t at = t.first_filter + f;
    if (args.new_scales && !b.part)
      args.new_scales[at] = float(*args.sigma) * std::sqrt(float(sum_filter<false>(w, b.length)));
    float scale = args.new_scales ? args.scales[at] : -args.scales[at];
    const bool adapt = t.fisher && !t.one_dim, adapt_each = t.fisher && t.one_dim;
    if (adapt) scale = adapted(scale, args.eta, t.fisher[f]);
    const PhiloxFilter filter = draws.filter(t.first_row + f, t.index);
    for (int64_t i = 0; i < b.length; i += REDUCE) {
      const int64_t n = std::min(REDUCE, b.length - i);
      if (!backup)
        for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(w + i + j + ahead);
      else copy(backup + i, w + i, n * sizeof(T), ahead * sizeof(T));
      normals(draws.keys, filter, b.start + i, n, z.x);
      auto* x = open(w + i, n, room);
      if (adapt_each) {
        for (int64_t j = 0; j < n; ++j) scales.x[j] = adapted(scale, args.eta, t.fisher[b.start + i + j]);
        add<true>(x, z.x, scale, scales.x, n);
      } else {
        add<false>(x, z.x, scale, nullptr, n);
      }
      close(w + i, n, room);
    }
  }
  fence();
}

static void perturb_block(const Tensor& t, const Block& b, const PerturbArgs& args) {
  const Draws draws = Draws::make(args.noise);
  FLATOPS_BY_DTYPE(t.dtype, perturb_block_of, t, b, draws, args)
}

static void normal_block(const Tensor& t, const Block& b, Noise noise) {
  const Draws draws = Draws::make(noise);
  Tile z;
  for (int64_t f = b.filter; f < b.filter + b.filters; ++f) {
    const PhiloxFilter filter = draws.filter(t.first_row + f, t.index);
    float* out = (float*)t.data + f * t.length + b.start;
    for (int64_t i = 0; i < b.length; i += REDUCE) {
      const int64_t n = std::min(REDUCE, b.length - i);
      normals(draws.keys, filter, b.start + i, n, z.x);
      copy(out + i, z.x, n * 4, 0);
    }
  }
  fence();
}

#else

#include "cpu/filter_sums.h"

namespace flatops {

static void add_noise(const TensorList& list, const cpu::PerturbArgs& args, const Parallel& parallel) {
  const auto perturb_block = FLATOPS_BEST(perturb_block);
  parallel(list.blocks.size(), [&](int64_t i) { perturb_block(list.tensors[list.blocks[i].tensor], list.blocks[i], args); });
}

template <>
void perturb_(TensorList& list, float* scales, const double* sigma, Noise noise, double eta, const Parallel& parallel) {
  list.cut();
  if (list.sums) {  // a long filter's norm must be known before any part of it changes
    std::vector<double> sums(list.filters);
    cpu::long_filter_sums(list, sums.data(), parallel);
    for (const Block& b : list.blocks) {
      const int64_t f = list.tensors[b.tensor].first_filter + b.filter;
      if (b.part) scales[f] = float(*sigma) * std::sqrt(float(sums[f]));
    }
  }
  add_noise(list, {.scales = scales, .new_scales = scales, .sigma = sigma, .noise = noise, .eta = eta}, parallel);
}

template <> void subtract_noise_(TensorList& list, const float* scales, Noise noise, double eta, const Parallel& parallel) {
  list.cut();
  add_noise(list, {.scales = scales, .noise = noise, .eta = eta}, parallel);
}

template <> void normal_(TensorList& list, Noise noise, const Parallel& parallel) {
  list.cut();
  const auto normal_block = FLATOPS_BEST(normal_block);
  parallel(list.blocks.size(), [&](int64_t i) { normal_block(list.tensors[list.blocks[i].tensor], list.blocks[i], noise); });
}

}  // namespace flatops
#endif
