// The CUDA kernels, compiled for the host.
#include "cuda/ascend.cu"
#include "cuda/mask.cu"
#include "cuda/perturb.cu"
#include "cuda/sum.cu"
