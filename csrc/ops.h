// What every operator looks like to the binding. Scalars that change from step to step come by address, because on a
// GPU they live there and reading them would stop the host.
#pragma once
#include <functional>

#include "tensor_list.h"

namespace flatops {

// Runs task(0) ... task(n - 1), in any order, on as many threads as the caller has.
using Parallel = std::function<void(int64_t n, const std::function<void(int64_t)>& task)>;

// Which numbers a perturbation draws: key = seed ^ (stream << 32), draw the count of perturbations.
struct Noise {
  const int64_t* key;
  const int64_t* draw;
};

namespace cpu {

// out[f] = ||w_f||_2                                                                      out: [list.filters]
void filter_norms(TensorList& list, float* out, const Parallel& parallel);

// w_f += scale_f z_f / sqrt(1 + eta F_f),  scale_f = sigma ||w_f||_2                      scales: [list.filters]
void perturb_(TensorList& list, float* scales, const double* sigma, Noise noise, double eta, const Parallel& parallel);

// w_f = backup_f where there is a backup, else w_f -= scale_f z_f / sqrt(1 + eta F_f)
void restore_(TensorList& list, const float* scales, Noise noise, double eta, const Parallel& parallel);

// out_f = z_f; float32 only
void normal_(TensorList& list, Noise noise, const Parallel& parallel);

// F_f = beta F_f + scale^2 sum(g_f^2); a sum that is not finite leaves F_f as it was. The gradients are `data`.
void filter_fisher_(TensorList& list, double beta, const double* scale, const Parallel& parallel);

// *out = ||g||_2 over the whole list, or with `adaptive` the norm of w g                   out: [1]
void grad_norm(TensorList& list, bool adaptive, double* out, const Parallel& parallel);

// w += s g, or with `adaptive` w += s w^2 g;  s = rho / norm, 0 where norm is 0 or not finite
void ascend_(TensorList& list, const double* rho, const double* norm, bool adaptive, const Parallel& parallel);

}  // namespace cpu
}  // namespace flatops
