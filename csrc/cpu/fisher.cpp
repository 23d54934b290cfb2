// filter_fisher_: ARWP's running Fisher, one number per filter (per element, for one-dimensional tensors).
#include "cpu/element.h"
#include "cpu/filter_sums.h"

namespace flatops::cpu {
namespace {

void update(float& fisher, double sum, double beta, double square_scale) {
  const double added = square_scale * sum;
  if (std::isfinite(added)) fisher = float(beta * fisher + added);
}

}  // namespace
}  // namespace flatops::cpu

namespace flatops {

template <> void filter_fisher_(TensorList& list, double beta, const double* scale, const Parallel& parallel) {
  const std::vector<double> sums = cpu::filter_sums(list, parallel);
  const double square_scale = *scale * *scale;
  for (const Tensor& t : list.tensors) {
    if (t.one_dim)
      for (int64_t i = 0; i < t.length; ++i) {
        const double g = cpu::element(t.data, t.dtype, i);
        cpu::update(t.fisher[i], g * g, beta, square_scale);
      }
    else
      for (int64_t f = 0; f < t.filters; ++f) cpu::update(t.fisher[f], sums[t.first_filter + f], beta, square_scale);
  }
}

}  // namespace flatops
