// A tile is up to REDUCE elements in the first-level cache. Kernels compute in float32 on tiles, in float64 on float64
// tensors; bfloat16 and float16 are converted on the way in and out.

struct Bf16 { uint16_t u; };
struct F16 { uint16_t u; };

struct alignas(64) Tile {
  float x[REDUCE + NORMALS];
};

FLATOPS_INLINE void widen(const Bf16* p, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = uint32_t(p[i].u) << 16;
    __builtin_memcpy(out + i, &u, 4);
  }
}
FLATOPS_INLINE void narrow(const float* x, int64_t n, Bf16* p) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u;
    __builtin_memcpy(&u, x + i, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;  // nearest, ties to even
    p[i].u = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}
FLATOPS_INLINE void widen(const F16* p, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, half_to_float(&p[i].u));
  if (i == n) return;
  uint16_t tail[W] = {};
  __builtin_memcpy(tail, p + i, (n - i) * 2);
  const F32 v = half_to_float(tail);
  __builtin_memcpy(out + i, &v, (n - i) * 4);
}
FLATOPS_INLINE void narrow(const float* x, int64_t n, F16* p) {
  int64_t i = 0;
  for (; i + W <= n; i += W) float_to_half(&p[i].u, load<F32>(x + i));
  if (i == n) return;
  F32 v = {};
  uint16_t tail[W];
  __builtin_memcpy(&v, x + i, (n - i) * 4);
  float_to_half(tail, v);
  __builtin_memcpy(p + i, tail, (n - i) * 2);
}

// The tile's elements to compute on: in place if we compute in their dtype, else converted into `room`.
template <class T> FLATOPS_INLINE float* open(T* p, int64_t n, Tile& room) {
  widen(p, n, room.x);
  return room.x;
}
FLATOPS_INLINE float* open(float* p, int64_t, Tile&) { return p; }
FLATOPS_INLINE double* open(double* p, int64_t, Tile&) { return p; }
template <class T> FLATOPS_INLINE const auto* open(const T* p, int64_t n, Tile& room) { return open(const_cast<T*>(p), n, room); }

// Converts back what open() converted.
template <class T> FLATOPS_INLINE void close(T* p, int64_t n, const Tile& room) { narrow(room.x, n, p); }
FLATOPS_INLINE void close(float*, int64_t, const Tile&) {}
FLATOPS_INLINE void close(double*, int64_t, const Tile&) {}

// Copies with stores that bypass the cache, if aligned: what is written is not read again soon. Prefetches `ahead`
// bytes, because such stores leave the memory idle between reads.
FLATOPS_INLINE void copy(void* to, const void* from, int64_t bytes, int64_t ahead) {
  char* out = (char*)to;
  const char* in = (const char*)from;
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % BYTES == 0)
    for (; i + BYTES <= bytes; i += BYTES) {
      __builtin_prefetch(in + i + ahead);
      stream(out + i, load<F32>(in + i));
    }
  __builtin_memcpy(out + i, in + i, bytes - i);
}

// kernel<T>(arguments) for the dtype's T.
#define FLATOPS_BY_DTYPE(dtype, kernel, ...)             \
  switch (dtype) {                                       \
    case DType::f32: return kernel<float>(__VA_ARGS__);  \
    case DType::bf16: return kernel<Bf16>(__VA_ARGS__);  \
    case DType::f16: return kernel<F16>(__VA_ARGS__);    \
    case DType::f64: return kernel<double>(__VA_ARGS__); \
  }
