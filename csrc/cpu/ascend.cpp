// ascend_: SAM's step along the gradient, one pass over weights and gradients.
#define FLATOPS_FILE "cpu/ascend.cpp"
#include "cpu/each_level.h"

#ifdef FLATOPS_LEVEL

// w += scale g, or scale w^2 g.
template <bool ADAPTIVE>
FLATOPS_INLINE void climb(float* w, const float* g, double step, int64_t n) {
  const float scale = float(step);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F32 v = load<F32>(w + i), d = load<F32>(g + i);
    store(w + i, fma(F32{} + scale, ADAPTIVE ? v * v * d : d, v));
  }
  for (; i < n; ++i) w[i] = __builtin_fmaf(scale, ADAPTIVE ? w[i] * w[i] * g[i] : g[i], w[i]);
}
template <bool ADAPTIVE>
FLATOPS_INLINE void climb(double* w, const double* g, double step, int64_t n) {
  for (int64_t i = 0; i < n; ++i) w[i] += step * (ADAPTIVE ? w[i] * w[i] * g[i] : g[i]);
}

template <class T>
static void ascend_block_of(const Tensor& t, const Block& b, double step, bool adaptive) {
  Tile room_w, room_g;
  for (int64_t i = b.start; i < b.start + b.length; i += REDUCE) {
    const int64_t n = std::min(REDUCE, b.start + b.length - i);
    T* w = (T*)t.data + i;
    if (t.backup) copy((T*)t.backup + i, w, n * sizeof(T), REDUCE * sizeof(T));
    if (step == 0) continue;  // not even 0 times an infinite gradient
    auto* x = open(w, n, room_w);
    const auto* g = open((const T*)t.grad + i, n, room_g);
    if (adaptive) climb<true>(x, g, step, n);
    else climb<false>(x, g, step, n);
    close(w, n, room_w);
  }
  fence();
}

static void ascend_block(const Tensor& t, const Block& b, double step, bool adaptive) {
  FLATOPS_BY_DTYPE(t.dtype, ascend_block_of, t, b, step, adaptive)
}

#else

namespace flatops {

template <> void ascend_(TensorList& list, const double* rho, const double* norm, bool adaptive, const Parallel& parallel) {
  list.cut(/*whole=*/true);
  const double step = *norm > 0 && std::isfinite(*norm) ? *rho / *norm : 0.0;
  const auto ascend_block = FLATOPS_BEST(ascend_block);
  parallel(list.blocks.size(),
           [&](int64_t i) { ascend_block(list.tensors[list.blocks[i].tensor], list.blocks[i], step, adaptive); });
}

}  // namespace flatops
#endif
