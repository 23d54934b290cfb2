// restore_ under a mask, which perturb.cpp asks for.
#pragma once
#include "ops.h"

namespace flatops::cpu {

void copy_back_masked(TensorList& list, const Parallel& parallel);

}  // namespace flatops::cpu
