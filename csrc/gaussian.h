// Two words become two normals: Box-Muller in float32, the same bits on every machine.
//
// Only fma, mul, sub, correctly rounded sqrt, int-to-float conversions and integer operations, in this order: no
// library call, no contraction by the compiler. Maximum error against exact arithmetic: see tests/test_noise.py.
// No include guard on purpose, as in philox.h. Needed from the includer:
//     F32, I32            as many floats / 32-bit integers as there are lanes
//     fma, sqrt_rn, to_float, bits, as_float, select_odd(I32 word, F32 if_odd, F32 if_even), FLATOPS_INLINE
//
// Radius: u = ((x >> 1) | 1) / 2^31 lies in (0, 1]; r = sqrt(-2 ln u), at most 6.56.
//   u = m 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1: -2 ln u = e (-2 ln 2) + f (-2 + f Q(f)).
// Angle: the word as a signed integer is an angle within a quarter turn, phi = x pi/4 / 2^31 in [-pi/4, pi/4);
//   its lowest bit swaps sine and cosine and its next bit rotates by pi, which covers the full circle.
FLATOPS_INLINE void box_muller(I32 radius, I32 angle, F32& z0, F32& z1) {
  constexpr int32_t SQRT_HALF = 0x3f3504f3;
  const I32 u = bits(to_float(((radius >> 1) & 0x7fffffff) | 1));
  const I32 t = u - (SQRT_HALF + (31 << 23));
  const F32 e = to_float(t >> 23);
  const F32 f = as_float((t & 0x007fffff) + SQRT_HALF) - 1.0f;
  F32 q = fma(f, 0.20116034f, -0.32527755f);
  q = fma(q, f, 0.34573421f);
  q = fma(q, f, -0.39793965f);
  q = fma(q, f, 0.49932399f);
  q = fma(q, f, -0.66670003f);
  q = fma(q, f, 1.0000091f);
  q = fma(q, f, -2.0f);
  const F32 r = sqrt_rn(fma(e, -1.3862944f, q * f));
  const F32 signed_r = as_float(bits(r) ^ ((angle & 2) << 30));

  const F32 x = to_float(angle) * 0x1p-31f;
  const F32 y = x * x;
  F32 s = fma(y, -3.5877224e-05f, 0.0024898719f);
  s = fma(s, y, -0.080745367f);
  s = fma(s, y, 0.78539815f);
  s = s * x;
  F32 c = fma(y, -0.00031888014f, 0.015849915f);
  c = fma(c, y, -0.30842425f);
  c = fma(c, y, 0.99999997f);
  z0 = signed_r * select_odd(angle, s, c);
  z1 = signed_r * select_odd(angle, c, s);
}
