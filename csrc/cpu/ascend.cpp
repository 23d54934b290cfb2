// ascend_: SAM's ascent, one pass over weights and gradients; restore_: the copy from a backup; both also under a mask.
// fisher_.
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

// F += (scale g)^2
static void add_squares(const Tensor& t, const Block& b, float scale) {
  float* f = (float*)t.data + b.start;
  const float* g = (const float*)t.grad + b.start;
  int64_t i = 0;
  for (; i + W <= b.length; i += W) {
    const F32 d = load<F32>(g + i) * scale;
    store(f + i, fma(d, d, load<F32>(f + i)));
  }
  for (; i < b.length; ++i) f[i] = __builtin_fmaf(scale * g[i], scale * g[i], f[i]);
}

template <class T> using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// --- under a mask: only elements whose bit is set are read, changed and backed up ------------------------------------

FLATOPS_INLINE int64_t ones(const uint32_t* bits, int64_t n) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += 32) count += __builtin_popcount(bits[j / 32] & (n - j < 32 ? (1u << (n - j)) - 1 : ~0u));
  return count;
}

// Gathers the selected of n elements; scatters them back.
template <class T> FLATOPS_INLINE void gather(const T* w, const uint32_t* bits, int64_t n, T* out) {
  for (int64_t j = 0; j < n; j += 32)
    for (uint32_t b = bits[j / 32] & (n - j < 32 ? (1u << (n - j)) - 1 : ~0u); b; b &= b - 1) *out++ = w[j + __builtin_ctz(b)];
}
template <class T> FLATOPS_INLINE void scatter(T* w, const uint32_t* bits, int64_t n, const T* in) {
  for (int64_t j = 0; j < n; j += 32)
    for (uint32_t b = bits[j / 32] & (n - j < 32 ? (1u << (n - j)) - 1 : ~0u); b; b &= b - 1) w[j + __builtin_ctz(b)] = *in++;
}
FLATOPS_INLINE uint32_t bits_at(const uint32_t* bits, int64_t i) { return bits[i / 32] >> (i % 32) & uint32_t((uint64_t(1) << W) - 1); }
template <> FLATOPS_INLINE void scatter(float* w, const uint32_t* bits, int64_t n, const float* in) {  // reads W - 1 elements too far
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const uint32_t b = bits_at(bits, i);
    store(w + i, choose(b, expand(b, load<F32>(in)), load<F32>(w + i)));
    in += __builtin_popcount(b);
  }
  for (; i < n; ++i)
    if (bits[i / 32] >> (i % 32) & 1) w[i] = *in++;
}

// Prefetches the next tile: there is too much work per element for the processor to look that far ahead.
template <class T> FLATOPS_INLINE void fetch(const T* p, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + j);
}

template <class T> struct alignas(64) Gathered { T x[REDUCE + W]; };

// Copies between the list's backup, from slot `first` on, and `count` contiguous elements.
template <class T> FLATOPS_INLINE void to_slots(const Gathered<T>& from, const MaskedBackup& b, int64_t first, int64_t count) {
  if (b.width == sizeof(T)) __builtin_memcpy((T*)b.data + first, from.x, count * sizeof(T));
  else
    for (int64_t k = 0; k < count; ++k) __builtin_memcpy((char*)b.data + (first + k) * b.width, from.x + k, sizeof(T));
}
template <class T> FLATOPS_INLINE void from_slots(Gathered<T>& to, const MaskedBackup& b, int64_t first, int64_t count) {
  if (b.width == sizeof(T)) __builtin_memcpy(to.x, (const T*)b.data + first, count * sizeof(T));
  else
    for (int64_t k = 0; k < count; ++k) __builtin_memcpy(to.x + k, (const char*)b.data + (first + k) * b.width, sizeof(T));
}

// Backs up the selected of n weights, and moves them.
template <bool ADAPTIVE>
FLATOPS_INLINE void climb_masked(float* w, const float* g, const uint32_t* bits, double step, int64_t n, float* kept) {
  const float scale = float(step);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const uint32_t b = bits_at(bits, i);
    const F32 v = load<F32>(w + i), d = load<F32>(g + i);
    store(kept, compress(b, v));
    kept += __builtin_popcount(b);
    if (step != 0) store(w + i, choose(b, fma(F32{} + scale, ADAPTIVE ? v * v * d : d, v), v));
  }
  for (; i < n; ++i) {
    if (!(bits[i / 32] >> (i % 32) & 1)) continue;
    *kept++ = w[i];
    if (step != 0) w[i] = __builtin_fmaf(scale, ADAPTIVE ? w[i] * w[i] * g[i] : g[i], w[i]);
  }
}
// Weights that do not change keep every bit, also of a NaN.
template <bool ADAPTIVE, class T>
FLATOPS_INLINE void climb_masked(T* w, const T* g, const uint32_t* bits, double step, int64_t n, T* kept) {
  gather(w, bits, n, kept);
  if (step == 0) return;  // not even 0 times an infinite gradient
  Tile room_w, room_g;
  Compute<T> x[REDUCE];
  T narrowed[REDUCE];
  __builtin_memcpy(x, open((const T*)w, n, room_w), n * sizeof(*x));
  climb<ADAPTIVE>(x, open(g, n, room_g), step, n);
  if constexpr (std::is_same_v<T, double>) __builtin_memcpy(narrowed, x, n * sizeof(T));
  else narrow(x, n, narrowed);
  for (int64_t j = 0; j < n; ++j)
    if (bits[j / 32] >> (j % 32) & 1) w[j] = narrowed[j];
}

template <class T>
static void ascend_masked_of(const Tensor& t, const Block& b, const MaskedBackup& backup, double step, bool adaptive) {
  Gathered<T> kept;
  for (int64_t i = b.start; i < b.start + b.length; i += REDUCE) {
    const int64_t n = std::min(REDUCE, b.start + b.length - i);
    const uint32_t* bits = t.bits + i / 32;
    const int64_t count = ones(bits, n);
    // An element without a slot, because the backup is another mask's, does not change.
    if (!count || (backup.data && t.ranks[i / REDUCE] + count > backup.slots)) continue;
    T* w = (T*)t.data + i;
    const T* g = (const T*)t.grad + i;
    fetch(w + REDUCE, n), fetch(g + REDUCE, n);
    if (adaptive) climb_masked<true>(w, g, bits, step, n, kept.x);
    else climb_masked<false>(w, g, bits, step, n, kept.x);
    if (backup.data) to_slots(kept, backup, t.ranks[i / REDUCE], count);
  }
}

static void ascend_block(const Tensor& t, const Block& b, const MaskedBackup& backup, double step, bool adaptive) {
  if (t.bits) FLATOPS_BY_DTYPE(t.dtype, ascend_masked_of, t, b, backup, step, adaptive)
  FLATOPS_BY_DTYPE(t.dtype, ascend_block_of, t, b, step, adaptive)
}

template <class T> static void restore_masked_of(const Tensor& t, const Block& b, const MaskedBackup& backup) {
  Gathered<T> kept;
  for (int64_t i = b.start; i < b.start + b.length; i += REDUCE) {
    const int64_t n = std::min(REDUCE, b.start + b.length - i);
    const uint32_t* bits = t.bits + i / 32;
    const int64_t count = ones(bits, n);
    if (!count || t.ranks[i / REDUCE] + count > backup.slots) continue;
    fetch((T*)t.data + i + REDUCE, n);
    from_slots(kept, backup, t.ranks[i / REDUCE], count);
    scatter((T*)t.data + i, bits, n, kept.x);
  }
}

static void restore_block(const Tensor& t, const Block& b, const MaskedBackup& backup) {
  if (t.bits) FLATOPS_BY_DTYPE(t.dtype, restore_masked_of, t, b, backup)
  constexpr int64_t AHEAD = 2048;  // prefetch distance, in elements
  const int64_t size = size_of(t.dtype);
  copy((char*)t.data + b.start * size, (const char*)t.backup + b.start * size, b.length * size, AHEAD * size);
  fence();
}

#else

namespace flatops {

template <> void ascend_(TensorList& list, const double* rho, const double* norm, bool adaptive, const Parallel& parallel) {
  list.cut(/*whole=*/true);
  const double step = *norm > 0 && std::isfinite(*norm) ? *rho / *norm : 0.0;
  const auto ascend_block = FLATOPS_BEST(ascend_block);
  parallel(list.blocks.size(), [&](int64_t i) {
    ascend_block(list.tensors[list.blocks[i].tensor], list.blocks[i], list.masked_backup, step, adaptive);
  });
}

template <> void restore_(TensorList& list, const Parallel& parallel) {
  list.cut(/*whole=*/true);
  const auto restore_block = FLATOPS_BEST(restore_block);
  parallel(list.blocks.size(),
           [&](int64_t i) { restore_block(list.tensors[list.blocks[i].tensor], list.blocks[i], list.masked_backup); });
}

template <> void fisher_(TensorList& list, const double* scale, const Parallel& parallel) {
  list.cut(/*whole=*/true);
  const auto add_squares = FLATOPS_BEST(add_squares);
  parallel(list.blocks.size(),
           [&](int64_t i) { add_squares(list.tensors[list.blocks[i].tensor], list.blocks[i], float(*scale)); });
}

}  // namespace flatops
#endif
