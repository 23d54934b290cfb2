// Filters too long for one block: their sums must be complete before a launch that needs them.
#pragma once
#include "ops.h"

namespace flatops::cuda {

// What is computed from a filter's sum of squares.
struct Finish {
  enum Kind { norm,
              scale,
              fisher } kind;
  float* out;            // norm: sqrt(sum); scale: *scalar times that; one per filter of the list
  const double* scalar;  // sigma, or fisher's scale
  double beta;           // fisher: F = beta F + scalar^2 sum, in place
};

// Computes this for the list's long filters, in two launches; none if there are no such filters.
void long_filters(const TensorList& list, const Finish& finish, const Gpu& gpu);

}  // namespace flatops::cuda
