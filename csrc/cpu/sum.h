// Float64 sums in the one order that every backend follows (reference.py: total): REDUCE elements at a time, element i on
// lane i mod LANES, lanes folded by halves; then the same over the sums, until one is left.

// A Term adds what elements i .. i + D, or the first `count` of them, contribute to the running sums.
struct Squares {
  const float* x;
  FLATOPS_INLINE static F64 add(const Squares& t, F64 sum, int64_t i) { return add_square(sum, widen(load<HalfF32>(t.x + i))); }
  FLATOPS_INLINE static F64 add(const Squares& t, F64 sum, int64_t i, int64_t count) {
    HalfF32 v = {};
    __builtin_memcpy(&v, t.x + i, count * 4);
    return add_square(sum, widen(v));
  }
};
struct SquaresF64 {
  const double* x;
  FLATOPS_INLINE static F64 add(const SquaresF64& t, F64 sum, int64_t i, int64_t count = D) {
    F64 v = {};
    __builtin_memcpy(&v, t.x + i, count * 8);
    return sum + v * v;  // two roundings: float64 squares are not exact, and PyTorch has no float64 fma
  }
};
struct ProductSquares {  // of x y, the product rounded to float64: exact for float32
  const float *x, *y;
  FLATOPS_INLINE static F64 add(const ProductSquares& t, F64 sum, int64_t i, int64_t count = D) {
    HalfF32 u = {}, v = {};
    __builtin_memcpy(&u, t.x + i, count * 4);
    __builtin_memcpy(&v, t.y + i, count * 4);
    const F64 p = widen(u) * widen(v);
    return sum + p * p;
  }
};
struct ProductSquaresF64 {
  const double *x, *y;
  FLATOPS_INLINE static F64 add(const ProductSquaresF64& t, F64 sum, int64_t i, int64_t count = D) {
    F64 u = {}, v = {};
    __builtin_memcpy(&u, t.x + i, count * 8);
    __builtin_memcpy(&v, t.y + i, count * 8);
    const F64 p = u * v;
    return sum + p * p;
  }
};
struct Values {
  const double* x;
  FLATOPS_INLINE static F64 add(const Values& t, F64 sum, int64_t i, int64_t count = D) {
    F64 v = {};
    __builtin_memcpy(&v, t.x + i, count * 8);
    return sum + v;
  }
};

FLATOPS_INLINE Squares squares(const float* x) { return {x}; }
FLATOPS_INLINE SquaresF64 squares(const double* x) { return {x}; }
FLATOPS_INLINE ProductSquares squares(const float* x, const float* y) { return {x, y}; }
FLATOPS_INLINE ProductSquaresF64 squares(const double* x, const double* y) { return {x, y}; }

// The sum of up to REDUCE elements.
template <class Term>
FLATOPS_INLINE double sum_tile(const Term& term, int64_t n) {
  constexpr int GROUP = 8;  // running sums kept in registers at a time
  F64 lanes[LANES / D];
  const int64_t steps = n / LANES;
  for (int g = 0; g < LANES / D; g += GROUP) {
    F64 sums[GROUP] = {};
    for (int64_t k = 0; k < steps; ++k)
      FLATOPS_UNROLL for (int v = 0; v < GROUP; ++v) sums[v] = Term::add(term, sums[v], k * LANES + (g + v) * D);
    for (int v = 0; v < GROUP; ++v) {
      const int64_t i = steps * LANES + (g + v) * D;
      if (i + D <= n) sums[v] = Term::add(term, sums[v], i);
      else if (i < n) sums[v] = Term::add(term, sums[v], i, n - i);
      lanes[g + v] = sums[v];
    }
  }
  FLATOPS_UNROLL for (int half = LANES / D / 2; half >= 1; half /= 2)
    FLATOPS_UNROLL for (int v = 0; v < half; ++v) lanes[v] += lanes[v + half];
  double last[D];
  store(last, lanes[0]);
  FLATOPS_UNROLL for (int half = D / 2; half >= 1; half /= 2)
    FLATOPS_UNROLL for (int v = 0; v < half; ++v) last[v] += last[v + half];
  return last[0];
}

// Reduces n sums to one, in place.
static double sum_sums(double* sums, int64_t n) {
  while (n > 1) {
    int64_t m = 0;
    for (int64_t i = 0; i < n; i += REDUCE) sums[m++] = sum_tile(Values{sums + i}, std::min(REDUCE, n - i));
    n = m;
  }
  return n ? sums[0] : 0.0;
}

// The sums of each REDUCE of n elements of x^2, or of (x y)^2 where y is given.
template <class T>
FLATOPS_INLINE void sum_tiles(const T* x, const T* y, int64_t n, double* sums) {
  Tile room_x, room_y;
  for (int64_t i = 0; i < n; i += REDUCE) {
    const int64_t m = std::min(REDUCE, n - i);
    const auto* a = open(x + i, m, room_x);
    *sums++ = y ? sum_tile(squares(a, open(y + i, m, room_y)), m) : sum_tile(squares(a), m);
  }
}

// The sum of squares of a filter that is not long.
template <class T>
FLATOPS_INLINE double sum_filter(const T* x, int64_t n) {
  double sums[BLOCK / REDUCE];
  sum_tiles(x, (const T*)nullptr, n, sums);
  return sum_sums(sums, (n + REDUCE - 1) / REDUCE);
}
