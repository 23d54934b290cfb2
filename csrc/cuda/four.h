// Four neighbours of a filter: a thread's part of a step, loaded and stored at once if aligned, computed on in float32
// (float64 for float64). Included only by .cu files.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "table.h"

namespace flatops::cuda {

struct Bf16 { uint16_t u; };
struct F16 { uint16_t u; };

template <class T> struct Wide_ { using type = float; };
template <> struct Wide_<double> { using type = double; };
template <class T> using Compute = typename Wide_<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(Bf16 x) { return __uint_as_float(uint32_t(x.u) << 16); }
__device__ inline float widen(F16 x) { return __half2float(__ushort_as_half(x.u)); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(float x, Bf16& out) { out.u = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void narrow(float x, F16& out) { out.u = __half_as_ushort(__float2half_rn(x)); }

template <class T> struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T x[4];
};

// The four, with zeros beyond the end. VECTOR: all four exist and are aligned.
template <bool VECTOR = false, class T> __device__ inline Four<T> load(const T* p, Left left) {
  if constexpr (!VECTOR)
    if (left.vector < 4) {
      Four<T> v{};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (c < left.elements) v.x[c] = p[c];
      return v;
    }
  return *reinterpret_cast<const Four<T>*>(p);
}

template <bool VECTOR = false, class T> __device__ inline void store(T* p, const Four<T>& v, Left left) {
  if constexpr (!VECTOR)
    if (left.vector < 4) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (c < left.elements) p[c] = v.x[c];
      return;
    }
  *reinterpret_cast<Four<T>*>(p) = v;
}

// A thread's fours, STEP elements apart.
template <int STEP, bool VECTOR = false, class T, int K> __device__ inline void load(Four<T> (&x)[K], const T* p, Left left) {
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (k * STEP < left.elements) x[k] = load<VECTOR>(p + k * STEP, left - k * STEP);
}
template <int STEP, bool VECTOR = false, class T, int K>
__device__ inline void store(T* p, const Four<T> (&x)[K], Left left) {
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (k * STEP < left.elements) store<VECTOR>(p + k * STEP, x[k], left - k * STEP);
}

// kernel<T> for the dtype's T: calls f with a null pointer to T.
template <class F> void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f((float*)nullptr);
    case DType::bf16: return f((Bf16*)nullptr);
    case DType::f16: return f((F16*)nullptr);
    case DType::f64: return f((double*)nullptr);
  }
}
constexpr DType DTYPES[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

}  // namespace flatops::cuda
