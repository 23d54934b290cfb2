// Sums of squares by filter, which several operators begin with.
#pragma once
#include "ops.h"

namespace flatops::cpu {

// One sum a filter, over the list's `data`. Cuts the list.
std::vector<double> filter_sums(TensorList& list, const Parallel& parallel);

// The same for the long filters of a list that is cut; the others' places are left alone.
void long_filter_sums(const TensorList& list, double* filter_sums, const Parallel& parallel);

}  // namespace flatops::cpu
