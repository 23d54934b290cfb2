// Filters too long for one block: their sums have to be complete before a launch that needs them.
#pragma once
#include "ops.h"

namespace flatops::cuda {

// What becomes of a filter's sum of squares.
struct Finish {
  enum Kind { norm,
              scale,
              fisher } kind;
  float* out;            // norm: sqrt(sum); scale: *scalar times that; one a filter of the list
  const double* scalar;  // sigma, or fisher's scale
  double beta;           // fisher: F = beta F + scalar^2 sum, in place
};

// Finishes the list's long filters, in two launches; none where there is no such filter.
void long_filters(const TensorList& list, const Finish& finish, const Gpu& gpu);

}  // namespace flatops::cuda
