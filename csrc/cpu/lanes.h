// One SIMD register of lanes, and the few operations on it that compilers do not generate well.
//
// Arithmetic uses GCC's and clang's vector extensions; only the widening multiply, fma, sqrt and shuffles are written
// per instruction set. Included once per level by each_level.h, inside that level's namespace.
// FLATOPS_LEVEL: 512 AVX-512, 256 AVX2 + FMA + F16C, 128 portable (SSE2, NEON or others).

constexpr int BYTES = FLATOPS_LEVEL / 8;
constexpr int W = BYTES / 4;  // 32-bit lanes
constexpr int D = BYTES / 8;  // 64-bit lanes

typedef float F32 __attribute__((vector_size(BYTES)));
typedef int32_t I32 __attribute__((vector_size(BYTES)));
typedef double F64 __attribute__((vector_size(BYTES)));
typedef uint64_t U64 __attribute__((vector_size(BYTES)));

// A Word is in a 64-bit lane, so that a product needs no rearrangement; the upper half is ignored.
typedef U64 Word;
typedef U64 Wide;
FLATOPS_INLINE Word splat(uint32_t x) { return Word{} + x; }
FLATOPS_INLINE Word high(Wide p) { return p >> 32; }
FLATOPS_INLINE Word low(Wide p) { return p; }

template <class V, class T> FLATOPS_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> FLATOPS_INLINE void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

FLATOPS_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
FLATOPS_INLINE I32 bits(F32 x) { return (I32)x; }
FLATOPS_INLINE F32 as_float(I32 x) { return (F32)x; }

// above and from: bit i says whether a[i] > b[i], or >=. choose, compress and expand take such bits.
#if FLATOPS_LEVEL == 512

const U64 BLOCK_ORDER = {0, 4, 1, 5, 2, 6, 3, 7};  // so that interleave() restores memory order
FLATOPS_INLINE Wide mul_wide(Word a, Word b) { return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
// The low halves of a in the even lanes, of b in the odd ones.
FLATOPS_INLINE I32 join(Word a, Word b) {
  return (I32)_mm512_mask_shuffle_epi32((__m512i)a, 0xAAAA, (__m512i)b, (_MM_PERM_ENUM)0xA0);
}
FLATOPS_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FLATOPS_INLINE F32 sqrt_rn(F32 a) { return (F32)_mm512_sqrt_ps((__m512)a); }
FLATOPS_INLINE F32 select_odd(I32 word, F32 odd, F32 even) {
  return (F32)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)word, _mm512_set1_epi32(1)), (__m512)even, (__m512)odd);
}
FLATOPS_INLINE void interleave(F32 a, F32 b, F32& lo, F32& hi) {
  lo = (F32)_mm512_unpacklo_ps((__m512)a, (__m512)b);
  hi = (F32)_mm512_unpackhi_ps((__m512)a, (__m512)b);
}
FLATOPS_INLINE void stream(void* p, F32 v) { _mm512_stream_ps((float*)p, (__m512)v); }
FLATOPS_INLINE void fence() { _mm_sfence(); }
FLATOPS_INLINE F32 half_to_float(const uint16_t* p) { return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FLATOPS_INLINE void float_to_half(uint16_t* p, F32 v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
FLATOPS_INLINE uint32_t above(F32 a, F32 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
FLATOPS_INLINE uint32_t from(F32 a, F32 b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
FLATOPS_INLINE F32 choose(uint32_t bits, F32 set, F32 clear) { return (F32)_mm512_mask_blend_ps(__mmask16(bits), (__m512)clear, (__m512)set); }
FLATOPS_INLINE F32 compress(uint32_t bits, F32 v) { return (F32)_mm512_maskz_compress_ps(__mmask16(bits), (__m512)v); }
FLATOPS_INLINE F32 expand(uint32_t bits, F32 v) { return (F32)_mm512_maskz_expand_ps(__mmask16(bits), (__m512)v); }

#elif FLATOPS_LEVEL == 256

const U64 BLOCK_ORDER = {0, 2, 1, 3};
FLATOPS_INLINE Wide mul_wide(Word a, Word b) { return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
FLATOPS_INLINE I32 join(Word a, Word b) {
  return (I32)_mm256_blend_epi32((__m256i)a, _mm256_slli_epi64((__m256i)b, 32), 0xAA);
}
FLATOPS_INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FLATOPS_INLINE F32 sqrt_rn(F32 a) { return (F32)_mm256_sqrt_ps((__m256)a); }
FLATOPS_INLINE F32 select_odd(I32 word, F32 odd, F32 even) {
  return (F32)_mm256_blendv_ps((__m256)even, (__m256)odd, (__m256)(word << 31));
}
FLATOPS_INLINE void interleave(F32 a, F32 b, F32& lo, F32& hi) {
  lo = (F32)_mm256_unpacklo_ps((__m256)a, (__m256)b);
  hi = (F32)_mm256_unpackhi_ps((__m256)a, (__m256)b);
}
FLATOPS_INLINE void stream(void* p, F32 v) { _mm256_stream_ps((float*)p, (__m256)v); }
FLATOPS_INLINE void fence() { _mm_sfence(); }
FLATOPS_INLINE F32 half_to_float(const uint16_t* p) { return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FLATOPS_INLINE void float_to_half(uint16_t* p, F32 v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
FLATOPS_INLINE uint32_t above(F32 a, F32 b) { return uint32_t(_mm256_movemask_ps((__m256)(a > b))); }
FLATOPS_INLINE uint32_t from(F32 a, F32 b) { return uint32_t(_mm256_movemask_ps((__m256)(a >= b))); }
FLATOPS_INLINE I32 lanes_of(uint32_t bits) {  // -1 where a bit is set
  const I32 each = {1, 2, 4, 8, 16, 32, 64, 128};
  return ((I32{} + int32_t(bits)) & each) == each;
}
FLATOPS_INLINE F32 choose(uint32_t bits, F32 set, F32 clear) {
  return (F32)_mm256_blendv_ps((__m256)clear, (__m256)set, (__m256)lanes_of(bits));
}
// pdep and pext make the permutation, one byte per lane.
FLATOPS_INLINE F32 permute(F32 v, uint64_t order) {
  return (F32)_mm256_permutevar8x32_ps((__m256)v, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(order))));
}
FLATOPS_INLINE uint64_t byte_mask(uint32_t bits) { return _pdep_u64(bits, 0x0101010101010101ull) * 0xff; }
FLATOPS_INLINE F32 compress(uint32_t bits, F32 v) { return permute(v, _pext_u64(0x0706050403020100ull, byte_mask(bits))); }
FLATOPS_INLINE F32 expand(uint32_t bits, F32 v) { return permute(v, _pdep_u64(0x0706050403020100ull, byte_mask(bits))); }

#else

const U64 BLOCK_ORDER = {0, 1};
FLATOPS_INLINE Wide mul_wide(Word a, Word b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
FLATOPS_INLINE I32 join(Word a, Word b) { return (I32)((a & 0xffffffffu) | (b << 32)); }
#if defined(__x86_64__)
// SSE2 has no fma. The float64 product of two float32 is exact, and a sum rounded to odd keeps what the second rounding
// needs (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). Not inlined: that took the compiler
// a minute.
__attribute__((noinline)) inline F32 fma(F32 a, F32 b, F32 c) {
  F32 out;
  for (int i = 0; i < W; ++i) {
    const double p = double(a[i]) * double(b[i]), d = c[i];
    double s = p + d;
    const double dp = s - d, err = (p - dp) + (d - (s - dp));
    uint64_t u;
    __builtin_memcpy(&u, &s, 8);
    if (err != 0 && !(u & 1) && s - s == 0) u += (err > 0) == (s > 0) ? 1 : -1;
    __builtin_memcpy(&s, &u, 8);
    out[i] = float(s);
  }
  return out;
}
#else
FLATOPS_INLINE F32 fma(F32 a, F32 b, F32 c) {
  F32 out;
  for (int i = 0; i < W; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
}
#endif
FLATOPS_INLINE F32 sqrt_rn(F32 a) {
  for (int i = 0; i < W; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
FLATOPS_INLINE F32 select_odd(I32 word, F32 odd, F32 even) {
  const I32 mask = -(word & 1);
  return as_float((bits(odd) & mask) | (bits(even) & ~mask));
}
FLATOPS_INLINE void interleave(F32 a, F32 b, F32& lo, F32& hi) {
  lo = F32{a[0], b[0], a[1], b[1]};
  hi = F32{a[2], b[2], a[3], b[3]};
}
FLATOPS_INLINE void stream(void* p, F32 v) { store((float*)p, v); }
FLATOPS_INLINE void fence() {}
FLATOPS_INLINE F32 half_to_float(const uint16_t* p) {
  F32 out;
  for (int i = 0; i < W; ++i) {
    // Shift the exponent into place, then scale: exact for normals and subnormals; inf and NaN keep their exponent.
    const uint32_t h = p[i], sign = (h & 0x8000u) << 16;
    uint32_t u = (h & 0x7fffu) << 13;
    float f;
    __builtin_memcpy(&f, &u, 4);
    f *= 0x1p112f;
    __builtin_memcpy(&u, &f, 4);
    if ((h & 0x7c00u) == 0x7c00u) u = 0x7f800000u | (h & 0x3ffu) << 13 | ((h & 0x3ffu) ? 0x400000u : 0);
    u |= sign;
    __builtin_memcpy(&f, &u, 4);
    out[i] = f;
  }
  return out;
}
FLATOPS_INLINE void float_to_half(uint16_t* p, F32 v) {
  for (int i = 0; i < W; ++i) {
    uint32_t u;
    const float f = v[i];
    __builtin_memcpy(&u, &f, 4);
    const uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    uint32_t h;
    if (u > 0x7f800000u) {
      h = 0x7e00u | ((u >> 13) & 0x3ffu);                 // NaN, quiet, payload kept as the hardware keeps it
    } else if (u >= 0x477ff000u) {
      h = 0x7c00u;                                        // rounds to infinity
    } else if (u < 0x38800000u) {                         // subnormal: the addition rounds at the right bit
      float a;
      __builtin_memcpy(&a, &u, 4);
      a += 0.5f;
      __builtin_memcpy(&h, &a, 4);
      h -= 0x3f000000u;
    } else {
      h = (u + 0xfffu + ((u >> 13) & 1) - (112u << 23)) >> 13;  // nearest, ties to even
    }
    p[i] = uint16_t(h | sign);
  }
}
FLATOPS_INLINE uint32_t above(F32 a, F32 b) {
  uint32_t out = 0;
  for (int i = 0; i < W; ++i) out |= uint32_t(a[i] > b[i]) << i;
  return out;
}
FLATOPS_INLINE uint32_t from(F32 a, F32 b) {
  uint32_t out = 0;
  for (int i = 0; i < W; ++i) out |= uint32_t(a[i] >= b[i]) << i;
  return out;
}
FLATOPS_INLINE F32 choose(uint32_t bits, F32 set, F32 clear) {
  for (int i = 0; i < W; ++i)
    if (bits >> i & 1) clear[i] = set[i];
  return clear;
}
FLATOPS_INLINE F32 compress(uint32_t bits, F32 v) {
  F32 out = {};
  for (int i = 0, n = 0; i < W; ++i)
    if (bits >> i & 1) out[n++] = v[i];
  return out;
}
FLATOPS_INLINE F32 expand(uint32_t bits, F32 v) {
  F32 out = {};
  for (int i = 0, n = 0; i < W; ++i)
    if (bits >> i & 1) out[i] = v[n++];
  return out;
}

#endif

FLATOPS_INLINE F32 fma(F32 a, float b, float c) { return fma(a, F32{} + b, F32{} + c); }
FLATOPS_INLINE F32 fma(F32 a, F32 b, float c) { return fma(a, b, F32{} + c); }
FLATOPS_INLINE F32 fma(F32 a, float b, F32 c) { return fma(a, F32{} + b, c); }
