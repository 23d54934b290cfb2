// restore_'s copy, which perturb.cu asks for.
#pragma once
#include "ops.h"

namespace flatops::cuda {

void copy_back(const TensorList& list, const Gpu& gpu);  // data = backup, under a mask where its bit is set

}  // namespace flatops::cuda
