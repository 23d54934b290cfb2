// restore_ under a mask, which perturb.cpp asks for.
#pragma once
#include "ops.h"

namespace flatops::cpu {

void restore_masked(const TensorList& list, const Parallel& parallel);  // of a list that is cut as a whole

}  // namespace flatops::cpu
