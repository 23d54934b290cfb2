// The normals of a filter, as many at a time as fit into registers.

struct Draws {  // the noise of one launch
  PhiloxKeys keys;
  uint64_t key;
  uint32_t draw;

  static Draws make(Noise noise) {
    const uint64_t key = uint64_t(*noise.key);
    return {philox_keys(key), key, uint32_t(*noise.draw)};
  }
  PhiloxFilter filter(int64_t filter, uint32_t tensor) const { return philox_filter(key, uint32_t(filter), tensor, draw); }
};

constexpr int NORMALS = 4 * D;  // per register of counters
constexpr int IN_FLIGHT = FLATOPS_LEVEL == 512 ? 4 : 3;

// The words of N registers of counters, paired for Box-Muller, and the normals that they become.
template <int N>
struct Words {
  I32 radius[N], angle[N];

  FLATOPS_INLINE void take(const Philox<N>& p) {
    FLATOPS_UNROLL for (int i = 0; i < N; ++i) radius[i] = join(p.c0[i], p.c2[i]), angle[i] = join(p.c1[i], p.c3[i]);
  }
  FLATOPS_INLINE void finish(int i, float* z) const {
    F32 even, odd, lo, hi;
    box_muller(radius[i], angle[i], even, odd);
    interleave(even, odd, lo, hi);
    store(z + i * NORMALS, lo);
    store(z + i * NORMALS + W, hi);
  }
};

FLATOPS_INLINE void normals(const PhiloxKeys& keys, const PhiloxFilter& filter, int64_t start, int64_t n, float* z) {
  constexpr int N = IN_FLIGHT;
  Word block = BLOCK_ORDER + uint64_t(start / 4);
  const float* end = z + n;
  if (n >= N * NORMALS) {
    Philox<N> p;
    Words<N> words;
    p.start(keys, filter, block, D);
    p.rounds(keys, 2, 10);
    words.take(p);
    for (; z + 2 * N * NORMALS <= end; z += N * NORMALS) {
      block += uint64_t(N * D);
      p.start(keys, filter, block, D);
      FLATOPS_UNROLL for (int i = 0; i < N; ++i) {
        words.finish(i, z);
        p.rounds(keys, 2 + 8 * i / N, 2 + 8 * (i + 1) / N);
      }
      words.take(p);
    }
    FLATOPS_UNROLL for (int i = 0; i < N; ++i) words.finish(i, z);
    z += N * NORMALS;
    block += uint64_t(N * D);
  }
  for (; z < end; z += NORMALS, block += uint64_t(D)) {
    Philox<1> p;
    Words<1> words;
    p.start(keys, filter, block, D);
    p.rounds(keys, 2, 10);
    words.take(p);
    words.finish(0, z);
  }
}
