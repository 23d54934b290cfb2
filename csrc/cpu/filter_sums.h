// Sums of squares per filter, with which several operators begin.
#pragma once
#include "ops.h"

namespace flatops::cpu {

// One sum per filter of the list's `data`. Cuts the list.
std::vector<double> filter_sums(TensorList& list, const Parallel& parallel);

// Only those of long filters, of a list that is cut; other entries are not written.
void long_filter_sums(const TensorList& list, double* filter_sums, const Parallel& parallel);

}  // namespace flatops::cpu
