// Reads one element of an array of any dtype.
#pragma once
#include <cmath>

#include "tensor_list.h"

namespace flatops::cpu {

inline double element(const void* x, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return ((const float*)x)[i];
    case DType::f64: return ((const double*)x)[i];
    case DType::bf16: {
      const uint32_t u = uint32_t(((const uint16_t*)x)[i]) << 16;
      float f;
      __builtin_memcpy(&f, &u, 4);
      return f;
    }
    case DType::f16: break;
  }
  const uint16_t h = ((const uint16_t*)x)[i];
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024 + mantissa, int(exponent) - 25)
                                      : std::ldexp(mantissa, -24);
  return h >> 15 ? -value : value;
}

}  // namespace flatops::cpu
