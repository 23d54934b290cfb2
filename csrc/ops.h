// The operators as the bindings call them, on CPU and GPU. Scalars that change from step to step are pointers: on a GPU
// they are in its memory, and reading them would be a host sync.
#pragma once
#include <functional>

#include "tensor_list.h"

namespace flatops {

// On a CPU: runs task(0) ... task(n - 1), in any order, on as many threads as the caller has.
using Parallel = std::function<void(int64_t n, const std::function<void(int64_t)>& task)>;

// On a GPU: the stream to launch on, and scratch memory that is freed when the launches on it have run.
struct Gpu {
  void* stream;  // cudaStream_t
  std::function<void*(int64_t bytes)> scratch;
};

// Selects the noise: key = seed ^ (stream << 32), draw = the number of perturbations so far.
struct Noise {
  const int64_t* key;
  const int64_t* draw;
};

// Each operator is specialised for Where = Parallel in csrc/cpu/ and for Where = Gpu in csrc/cuda/.

// out[f] = ||w_f||_2                                                                      out: [list.filters]
template <class Where> void filter_norms(TensorList& list, float* out, const Where& where);

// w_f += scale_f z_f / sqrt(1 + eta F_f),  scale_f = sigma ||w_f||_2                      scales: [list.filters]
template <class Where>
void perturb_(TensorList& list, float* scales, const double* sigma, Noise noise, double eta, const Where& where);

// w = backup; under a mask only where its bit is set
template <class Where> void restore_(TensorList& list, const Where& where);

// w_f -= scale_f z_f / sqrt(1 + eta F_f): what perturb_ added, drawn again                 scales: [list.filters]
template <class Where> void subtract_noise_(TensorList& list, const float* scales, Noise noise, double eta, const Where& where);

// out_f = z_f; float32 only
template <class Where> void normal_(TensorList& list, Noise noise, const Where& where);

// F_f = beta F_f + scale^2 sum(g_f^2), unless the sum is not finite. The gradients are `data`.
template <class Where> void filter_fisher_(TensorList& list, double beta, const double* scale, const Where& where);

// *out = ||g||_2 over the whole list, or with `adaptive` the norm of w g                   out: [1]
template <class Where> void grad_norm(TensorList& list, bool adaptive, double* out, const Where& where);

// w += s g, or with `adaptive` w += s w^2 g;  s = rho / norm, or 0 if the norm is 0 or not finite. Under a mask only
// where its bit is set.
template <class Where>
void ascend_(TensorList& list, const double* rho, const double* norm, bool adaptive, const Where& where);

// F += (scale g)^2, in float32; F is `data`
template <class Where> void fisher_(TensorList& list, const double* scale, const Where& where);

// Sets the bits of the `count` largest scores, ties to the first; *bad: the first tensor with a NaN or a negative
// score, or -1.
// The mask is `bits` and `ranks`.
template <class Where> void topk_mask(TensorList& list, int64_t count, int64_t* bad, const Where& where);

// Of the set bits clears those of the `count` lowest |drop|, of the others sets those of the `count` largest |grow|;
// `random` chooses random scores instead. Nothing changes if *bad is not -1.
struct Random { bool drop, grow; };
template <class Where>
void regrow_mask_(TensorList& drop, TensorList& grow, Random random, Noise noise, int64_t count, int64_t* bad, const Where& where);

}  // namespace flatops
