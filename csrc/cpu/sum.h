// Sums in the order that every backend follows (reference.py: sum_squares, total).
//
// Squares are summed REDUCE elements at a time in the dtype that kernels compute in: element i in lane i mod LANES, by
// fma in float32, and the lanes are folded by halves. These sums are added up in float64 by the same rule, until one is
// left.

template <class X> struct VectorOf;
template <> struct VectorOf<float> { using type = F32; };
template <> struct VectorOf<double> { using type = F64; };

FLATOPS_INLINE F32 add_square(F32 sum, F32 x) { return fma(x, x, sum); }
FLATOPS_INLINE F64 add_square(F64 sum, F64 x) { return sum + x * x; }  // two roundings: PyTorch has no float64 fma

// A term adds the contribution of the elements from i on to a register of running sums; padded() is a copy of its last
// elements padded with zeros, which change no sum.
template <class X> struct Squares {
  using V = typename VectorOf<X>::type;
  const X* x;
  FLATOPS_INLINE V add(V sum, int64_t i) const { return add_square(sum, load<V>(x + i)); }
  FLATOPS_INLINE Squares padded(int64_t i, int64_t n, X* room) const {
    __builtin_memcpy(room, x + i, n * sizeof(X));
    return {room};
  }
};
template <class X> struct ProductSquares {  // of x y
  using V = typename VectorOf<X>::type;
  const X *x, *y;
  FLATOPS_INLINE V add(V sum, int64_t i) const { return add_square(sum, load<V>(x + i) * load<V>(y + i)); }
  FLATOPS_INLINE ProductSquares padded(int64_t i, int64_t n, X* room) const {
    __builtin_memcpy(room, x + i, n * sizeof(X));
    __builtin_memcpy(room + sizeof(V) / sizeof(X), y + i, n * sizeof(X));
    return {room, room + sizeof(V) / sizeof(X)};
  }
};
struct Values {
  using V = F64;
  const double* x;
  FLATOPS_INLINE V add(V sum, int64_t i) const { return sum + load<V>(x + i); }
  FLATOPS_INLINE Values padded(int64_t i, int64_t n, double* room) const {
    __builtin_memcpy(room, x + i, n * sizeof(double));
    return {room};
  }
};

// The sum of a term over up to REDUCE elements.
template <class Term>
FLATOPS_INLINE double sum_tile(const Term& term, int64_t n) {
  using V = typename Term::V;
  using X = std::remove_cvref_t<decltype(V{}[0])>;
  constexpr int L = sizeof(V) / sizeof(X), VECTORS = LANES / L, GROUP = 8;  // GROUP: as many as fit into registers
  const int64_t steps = n / LANES, whole = n / L * L;  // whole: elements that fill registers
  alignas(64) X room[2 * L];
  Term tail = term;
  if (whole < n) {
    __builtin_memset(room, 0, sizeof room);
    tail = term.padded(whole, n - whole, room);
  }
  V lanes[VECTORS];
  FLATOPS_UNROLL for (int g = 0; g < VECTORS; g += GROUP) {
    V sums[GROUP] = {};
    for (int64_t k = 0; k < steps; ++k)
      FLATOPS_UNROLL for (int v = 0; v < GROUP; ++v) sums[v] = term.add(sums[v], k * LANES + (g + v) * L);
    FLATOPS_UNROLL for (int v = 0; v < GROUP; ++v) {
      const int64_t i = steps * LANES + (g + v) * L;
      if (i < whole) sums[v] = term.add(sums[v], i);
      else if (i < n) sums[v] = tail.add(sums[v], 0);
    }
    FLATOPS_UNROLL for (int v = 0; v < GROUP; ++v) lanes[g + v] = sums[v];
  }
  FLATOPS_UNROLL for (int half = VECTORS / 2; half >= 1; half /= 2)
      FLATOPS_UNROLL for (int v = 0; v < half; ++v) lanes[v] += lanes[v + half];
  X last[L];
  store(last, lanes[0]);
  FLATOPS_UNROLL for (int half = L / 2; half >= 1; half /= 2)
      FLATOPS_UNROLL for (int v = 0; v < half; ++v) last[v] += last[v + half];
  return last[0];
}

// Adds up n sums, in place.
static double sum_sums(double* sums, int64_t n) {
  while (n > 1) {
    int64_t m = 0;
    for (int64_t i = 0; i < n; i += REDUCE) sums[m++] = sum_tile(Values{sums + i}, std::min(REDUCE, n - i));
    n = m;
  }
  return n ? sums[0] : 0.0;
}

// The sums of each REDUCE of n elements of x^2, or with y of (x y)^2.
template <bool PREFETCH, class T>
FLATOPS_INLINE void sum_tiles(const T* x, const T* y, int64_t n, double* sums) {
  Tile room_x, room_y;
  for (int64_t i = 0; i < n; i += REDUCE) {
    const int64_t m = std::min(REDUCE, n - i);
    for (int64_t j = 0; PREFETCH && j < m; j += 64 / int64_t(sizeof(T))) {  // prefetches the next tile, which is read with a stride
      __builtin_prefetch(x + i + REDUCE + j);
      if (y) __builtin_prefetch(y + i + REDUCE + j);
    }
    const auto* a = open(x + i, m, room_x);
    using X = std::remove_cvref_t<decltype(*a)>;
    *sums++ = y ? sum_tile(ProductSquares<X>{a, open(y + i, m, room_y)}, m) : sum_tile(Squares<X>{a}, m);
  }
}

// The sum of squares of a filter that is not long.
template <bool PREFETCH, class T>
FLATOPS_INLINE double sum_filter(const T* x, int64_t n) {
  double sums[BLOCK / REDUCE];
  sum_tiles<PREFETCH>(x, (const T*)nullptr, n, sums);
  return sum_sums(sums, (n + REDUCE - 1) / REDUCE);
}
