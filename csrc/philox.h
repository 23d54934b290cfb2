// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for one counter a lane.
//
// No include guard on purpose: a SIMD build includes this file once per instruction set, inside that set's namespace,
// after `lanes.h` has defined Word. A Word carries 32 bits; the upper bits of a wider register are ignored.
// Needed from the includer:
//     Word, Wide          a 32-bit word; a 64-bit product
//     mul_wide(Word, Word) -> Wide, high(Wide) -> Word, low(Wide) -> Word, splat(uint32_t) -> Word, FLATOPS_INLINE

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;

// The key of each round. It depends only on seed and stream, so a launch computes it once.
struct PhiloxKeys {
  Word k0[10], k1[10];
};

FLATOPS_INLINE PhiloxKeys philox_keys(uint64_t key) {
  PhiloxKeys keys;
  for (uint32_t r = 0; r < 10; ++r) {
    keys.k0[r] = splat(uint32_t(key) + r * PHILOX_W0);
    keys.k1[r] = splat(uint32_t(key >> 32) + r * PHILOX_W1);
  }
  return keys;
}

// The part of rounds 0 and 1 that depends on (filter, tensor, draw), which all blocks of a filter share.
struct PhiloxFilter {
  Word c1, c2_key;    // round 0: the next c1; what high(M0 * block) is xored with to give the next c2
  Word c2, c3;        // round 1: what c3 is xored with to give the next c2 (key included); the next c3
};

FLATOPS_INLINE PhiloxFilter philox_filter(uint64_t key, uint32_t filter, uint32_t tensor, uint32_t draw) {
  const uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  const uint64_t p1 = uint64_t(PHILOX_M1) * tensor;
  const uint32_t c0 = uint32_t(p1 >> 32) ^ filter ^ k0;
  const uint64_t p0 = uint64_t(PHILOX_M0) * c0;
  return {splat(uint32_t(p1)), splat(draw ^ k1), splat(uint32_t(p0 >> 32) ^ (k1 + PHILOX_W1)), splat(uint32_t(p0))};
}

// N counters (block, filter, tensor, draw) that become N times four words; N hides the multiplier's latency.
template <int N>
struct Philox {
  Word c0[N], c1[N], c2[N], c3[N];

  // Rounds 0 and 1.
  FLATOPS_INLINE void start(const PhiloxKeys& keys, const PhiloxFilter& f, Word block, uint64_t step) {
    const Word m0 = splat(PHILOX_M0), m1 = splat(PHILOX_M1);
    FLATOPS_UNROLL for (int i = 0; i < N; ++i) {
      const Wide p0 = mul_wide(m0, block + i * step);
      const Wide p1 = mul_wide(m1, high(p0) ^ f.c2_key);
      c0[i] = high(p1) ^ f.c1 ^ keys.k0[1];
      c1[i] = low(p1);
      c2[i] = f.c2 ^ low(p0);
      c3[i] = f.c3;
    }
  }

  FLATOPS_INLINE void rounds(const PhiloxKeys& keys, int first, int last) {
    const Word m0 = splat(PHILOX_M0), m1 = splat(PHILOX_M1);
    FLATOPS_UNROLL for (int r = first; r < last; ++r) {
      FLATOPS_UNROLL for (int i = 0; i < N; ++i) {
        const Wide p0 = mul_wide(m0, c0[i]), p1 = mul_wide(m1, c2[i]);
        c0[i] = high(p1) ^ c1[i] ^ keys.k0[r];
        c1[i] = low(p1);
        c2[i] = high(p0) ^ c3[i] ^ keys.k1[r];
        c3[i] = low(p0);
      }
    }
  }
};
