// Registers the emulated CUDA kernels as torch.ops.flatops_emulated, for CPU tensors.
#include <ATen/ops/full.h>

#include "bindings.h"

namespace flatops {

struct Emulated {
  static constexpr at::DeviceType type = at::kCPU;
  std::vector<at::Tensor> scratch;
  Gpu where;

  explicit Emulated(at::Device)
      : where{nullptr, [this](int64_t bytes) {
                // Filled with NaN, so that reads of unwritten memory show.
                scratch.push_back(at::full({bytes / 8 + 1}, NAN, at::kDouble));
                return scratch.back().data_ptr();
              }} {}
  Emulated(const Emulated&) = delete;
};

TORCH_LIBRARY_IMPL(flatops_emulated, CPU, m) { implement<Emulated>(m); }

}  // namespace flatops
