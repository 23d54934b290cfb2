// bfloat16 as far as the kernels use it; see cuda_runtime.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t u;
};
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.u; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
