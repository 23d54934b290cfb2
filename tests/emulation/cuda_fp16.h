// Half precision as far as the kernels use it; see cuda_runtime.h.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
  _Float16 value;
};
inline __half __ushort_as_half(uint16_t u) {
  __half h;
  std::memcpy(&h, &u, 2);
  return h;
}
inline uint16_t __half_as_ushort(__half h) {
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
}
inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
