// The normals of a filter, as many at a time as the registers take.

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

constexpr int NORMALS = 4 * D;  // that one register of counters makes
constexpr int IN_FLIGHT = FLATOPS_LEVEL == 512 ? 4 : 2;

template <int N>
FLATOPS_INLINE void normals_step(const PhiloxKeys& keys, const PhiloxFilter& filter, Word block, float* z) {
  Word blocks[N], words[4][N];
  FLATOPS_UNROLL for (int i = 0; i < N; ++i) blocks[i] = block + uint64_t(i * D);
  philox<N>(keys, filter, blocks, words);
  FLATOPS_UNROLL for (int i = 0; i < N; ++i) {
    F32 even, odd, lo, hi;
    box_muller(join(words[0][i], words[2][i]), join(words[1][i], words[3][i]), even, odd);
    interleave(even, odd, lo, hi);
    store(z + i * NORMALS, lo);
    store(z + i * NORMALS + W, hi);
  }
}

// z[0 .. n) = the normals of offsets start .. start + n, start a multiple of 4. Writes up to NORMALS - 1 beyond n.
FLATOPS_INLINE void normals(const PhiloxKeys& keys, const PhiloxFilter& filter, int64_t start, int64_t n, float* z) {
  Word block = BLOCK_ORDER + uint64_t(start / 4);
  int64_t i = 0;
  for (; i + IN_FLIGHT * NORMALS <= n; i += IN_FLIGHT * NORMALS, block += uint64_t(IN_FLIGHT * D))
    normals_step<IN_FLIGHT>(keys, filter, block, z + i);
  for (; i < n; i += NORMALS, block += uint64_t(D)) normals_step<1>(keys, filter, block, z + i);
}
