// filter_fisher_: ARWP's running Fisher, one number a filter (an element, for one-dimensional tensors).
#include <cmath>

#include "cpu/filter_sums.h"

namespace flatops::cpu {
namespace {

void update(float& fisher, double sum, double beta, double square_scale) {
  const double added = square_scale * sum;
  if (std::isfinite(added)) fisher = float(beta * fisher + added);
}

float from_bits(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

double element(const Tensor& t, int64_t i) {
  switch (t.dtype) {
    case DType::f32: return ((const float*)t.data)[i];
    case DType::bf16: return from_bits(uint32_t(((const uint16_t*)t.data)[i]) << 16);
    case DType::f64: return ((const double*)t.data)[i];
    case DType::f16: break;
  }
  const uint16_t h = ((const uint16_t*)t.data)[i];
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double x = exponent == 31 ? (mantissa ? NAN : INFINITY)
                   : exponent     ? std::ldexp(1024 + mantissa, int(exponent) - 25)
                                  : std::ldexp(mantissa, -24);
  return h >> 15 ? -x : x;
}

}  // namespace
}  // namespace flatops::cpu

namespace flatops {

template <> void filter_fisher_(TensorList& list, double beta, const double* scale, const Parallel& parallel) {
  const std::vector<double> sums = cpu::filter_sums(list, parallel);
  const double square_scale = *scale * *scale;
  for (const Tensor& t : list.tensors) {
    if (t.one_dim)
      for (int64_t i = 0; i < t.length; ++i) cpu::update(t.fisher[i], cpu::element(t, i) * cpu::element(t, i), beta, square_scale);
    else
      for (int64_t f = 0; f < t.filters; ++f) cpu::update(t.fisher[f], sums[t.first_filter + f], beta, square_scale);
  }
}

}  // namespace flatops
