// PyTorch's side of the kernels: the only file that knows torch. Schemas stand in flatops/schemas.py, what a user may pass
// is checked in flatops/ops.py for all backends; here only what memory safety needs.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <atomic>
#include <numeric>

#include "cpu/level.h"
#include "ops.h"

namespace flatops {
namespace {

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kDouble: return DType::f64;
    default: TORCH_CHECK(false, "flatops: unsupported dtype ", t.scalar_type());
  }
}

// Dimension 0, then the others as they lie in memory: storage order within a filter.
at::DimVector storage_order(const at::Tensor& t) {
  at::DimVector order(t.dim());
  std::iota(order.begin(), order.end(), 0);
  if (t.dim() > 2)
    std::stable_sort(order.begin() + 1, order.end(), [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  return order;
}

// Tensors as the kernels see them. What does not lie filter after filter is copied so that it does, and put back.
class Operands {
 public:
  explicit Operands(const at::TensorList& tensors) : tensors_(tensors) {}

  // What a kernel may read (and, until write_back, change) in place of tensor i.
  void* data(size_t i) { return at(tensors_, i, tensors_[i], copies_); }

  // The same elements of another tensor of the same shape, in the order of tensor i.
  void* like(size_t i, const at::Tensor& other, std::vector<std::pair<at::Tensor, at::Tensor>>& copies) {
    TORCH_CHECK(other.sizes() == tensors_[i].sizes(), "flatops: tensors ", i, " differ in shape");
    return at(tensors_, i, other, copies);
  }

  static void write_back(const std::vector<std::pair<at::Tensor, at::Tensor>>& copies) {
    for (const auto& [view, copy] : copies) const_cast<at::Tensor&>(view).copy_(copy);
  }
  void write_back() { write_back(copies_); }

 private:
  static void* at(const at::TensorList& tensors, size_t i, const at::Tensor& t,
                  std::vector<std::pair<at::Tensor, at::Tensor>>& copies) {
    const at::Tensor& order_of = tensors[i];
    if (t.is_contiguous() && order_of.is_contiguous() && t.scalar_type() == order_of.scalar_type()) return t.data_ptr();
    const at::Tensor view = t.permute(storage_order(order_of));
    if (view.is_contiguous() && t.scalar_type() == order_of.scalar_type()) return t.data_ptr();
    at::Tensor copy = at::empty(view.sizes(), view.options().dtype(order_of.scalar_type()).memory_format(std::nullopt));
    copy.copy_(view);
    copies.emplace_back(view, copy);
    return copy.data_ptr();
  }

  at::TensorList tensors_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
};

// Everything a launch needs of its tensors, and the copies that odd layouts cost.
struct Launch {
  at::AutoDispatchBelowADInplaceOrView below_autograd;  // copies of odd layouts are no business of autograd's
  Operands operands;
  std::vector<std::pair<at::Tensor, at::Tensor>> others;
  TensorList list;

  Launch(const at::TensorList& data, const at::TensorList& grads, const at::TensorList& backup,
         const at::TensorList& fisher, at::IntArrayRef index)
      : operands(data) {
    const size_t n = data.size();
    const auto fits = [n](size_t m) { return m == 0 || m == n; };
    TORCH_CHECK(fits(grads.size()) && fits(backup.size()) && fits(fisher.size()) && fits(index.size()),
                "flatops: lists differ in length");
    list.tensors.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor& t = data[i];
      TORCH_CHECK(t.device().is_cpu(), "flatops: tensor ", i, " is on ", t.device(), ", expected cpu");
      const bool one_dim = t.dim() <= 1;
      const int64_t filters = t.numel() == 0 ? 0 : one_dim ? 1 : t.size(0);
      float* f = nullptr;
      if (!fisher.empty()) {
        const at::Tensor& q = fisher[i];
        TORCH_CHECK(q.scalar_type() == at::kFloat && q.is_contiguous() && q.numel() == (t.dim() ? t.size(0) : 1),
                    "flatops: fisher ", i, " must be a contiguous float32 tensor with one entry per slice along dim 0");
        f = q.data_ptr<float>();
      }
      list.tensors.push_back({operands.data(i), grads.empty() ? nullptr : operands.like(i, grads[i], others),
                              backup.empty() ? nullptr : operands.like(i, backup[i], backups_), f, filters,
                              filters ? t.numel() / filters : 0, list.filters,
                              uint32_t(index.empty() ? i : index[i]), dtype_of(t), one_dim});
      list.filters += filters;
    }
  }

  // Two tensors over the same memory would be changed twice and backed up in between: no backup could undo that.
  void check_disjoint(const char* name) const {
    std::vector<std::pair<const char*, size_t>> starts;
    for (size_t i = 0; i < list.tensors.size(); ++i)
      if (list.tensors[i].filters) starts.emplace_back((const char*)list.tensors[i].data, i);
    std::sort(starts.begin(), starts.end());
    for (size_t k = 1; k < starts.size(); ++k) {
      const Tensor& t = list.tensors[starts[k - 1].second];
      const int64_t size = t.dtype == DType::f64 ? 8 : t.dtype == DType::f32 ? 4 : 2;
      TORCH_CHECK_VALUE(starts[k - 1].first + t.numel() * size <= starts[k].first, name, "[", starts[k - 1].second, "] and ",
                        name, "[", starts[k].second, "] share memory: pass it once");
    }
  }

  // Puts back what was copied and tells autograd.
  void wrote(const at::TensorList& tensors) {
    operands.write_back();
    Operands::write_back(backups_);
    bump(tensors);
  }
  static void bump(const at::TensorList& tensors) {
    for (const at::Tensor& t : tensors)
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> backups_;
};

// Shares the tasks among ATen's threads, one at a time: filters differ in length, and so do cores.
void parallel(int64_t n, const std::function<void(int64_t)>& task) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), n);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i; (i = next++) < n;) task(i);
  });
}

template <class T> const T* scalar(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.numel() == 1 && t.scalar_type() == c10::CppTypeToScalarType<T>::value, "flatops: ", name,
              " must be one ", c10::CppTypeToScalarType<T>::value);
  return t.data_ptr<T>();
}
Noise noise(const at::Tensor& key, const at::Tensor& draw) {
  return {scalar<int64_t>(key, "key"), scalar<int64_t>(draw, "draw")};
}
float* scales_of(const at::Tensor& scales, const TensorList& list) {
  TORCH_CHECK(scales.scalar_type() == at::kFloat && scales.is_contiguous() && scales.numel() == list.filters,
              "flatops: scales must be a contiguous float32 tensor of ", list.filters, " entries");
  return scales.data_ptr<float>();
}

at::Tensor filter_norms(at::TensorList params) {
  Launch launch(params, {}, {}, {}, {});
  at::Tensor out = at::empty({launch.list.filters}, at::kFloat);
  cpu::filter_norms(launch.list, out.data_ptr<float>(), parallel);
  return out;
}

void perturb_(at::TensorList params, at::Tensor scales, at::TensorList backup, const at::Tensor& sigma,
              const at::Tensor& key, const at::Tensor& draw, at::IntArrayRef index, at::TensorList fisher, double eta) {
  Launch launch(params, {}, backup, fisher, index);
  launch.check_disjoint("params");
  cpu::perturb_(launch.list, scales_of(scales, launch.list), scalar<double>(sigma, "sigma"), noise(key, draw), eta,
                parallel);
  launch.wrote(params);
  Launch::bump(backup);
  Launch::bump({scales});
}

void restore_(at::TensorList params, at::TensorList backup, const std::optional<at::Tensor>& scales,
              const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& draw, at::IntArrayRef index,
              at::TensorList fisher, double eta) {
  Launch launch(params, {}, backup, fisher, index);
  if (scales) {
    TORCH_CHECK(backup.empty() && key && draw, "flatops: restore_ takes a backup, or scales, key and draw");
    cpu::restore_(launch.list, scales_of(*scales, launch.list), noise(*key, *draw), eta, parallel);
  } else {
    TORCH_CHECK(backup.size() == params.size(), "flatops: restore_ takes a backup, or scales, key and draw");
    cpu::restore_(launch.list, nullptr, {}, eta, parallel);
  }
  launch.wrote(params);
}

void normal_(at::Tensor out, const at::Tensor& key, const at::Tensor& draw, int64_t index) {
  TORCH_CHECK(out.scalar_type() == at::kFloat, "flatops: normal_ fills float32");
  const std::vector<at::Tensor> outs{out};
  Launch launch(outs, {}, {}, {}, {index});
  cpu::normal_(launch.list, noise(key, draw), parallel);
  launch.wrote(outs);
}

void filter_fisher_(at::TensorList fisher, at::TensorList grads, double beta, const at::Tensor& scale) {
  Launch launch(grads, {}, {}, fisher, {});
  cpu::filter_fisher_(launch.list, beta, scalar<double>(scale, "scale"), parallel);
  Launch::bump(fisher);
}

at::Tensor grad_norm(at::TensorList grads, at::TensorList params) {
  Launch launch(params.empty() ? grads : params, params.empty() ? at::TensorList{} : grads, {}, {}, {});
  at::Tensor out = at::empty({}, at::kDouble);
  cpu::grad_norm(launch.list, !params.empty(), out.data_ptr<double>(), parallel);
  return out;
}

void ascend_(at::TensorList params, at::TensorList grads, at::TensorList backup, const at::Tensor& rho,
             const at::Tensor& norm, bool adaptive) {
  TORCH_CHECK(grads.size() == params.size(), "flatops: lists differ in length");
  Launch launch(params, grads, backup, {}, {});
  launch.check_disjoint("params");
  cpu::ascend_(launch.list, scalar<double>(rho, "rho"), scalar<double>(norm, "norm"), adaptive, parallel);
  launch.wrote(params);
  Launch::bump(backup);
}

TORCH_LIBRARY_IMPL(flatops, CPU, m) {
  m.impl("filter_norms", filter_norms);
  m.impl("perturb_", perturb_);
  m.impl("restore_", restore_);
  m.impl("normal_", normal_);
  m.impl("filter_fisher_", filter_fisher_);
  m.impl("grad_norm", grad_norm);
  m.impl("ascend_", ascend_);
}

void set_simd(const std::string& name) {
  for (cpu::Level l : {cpu::Level::portable, cpu::Level::avx2, cpu::Level::avx512})
    if (name == cpu::level_name(l)) {
      if (!cpu::supports(l)) throw std::invalid_argument("this machine cannot run " + name);
      return cpu::set_level(l);
    }
  throw std::invalid_argument("unknown SIMD level '" + name + "': expected portable, avx2 or avx512");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "flatops' compiled kernels; importing this registers torch.ops.flatops.";
  m.attr("torch_version") = TORCH_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.attr("cuda_archs") = pybind11::list();
  m.def("insist", [](pybind11::function f) {
    return pybind11::cpp_function([f](const pybind11::args& args) {
      try {
        return f(*args);
      } catch (pybind11::error_already_set&) {
        f(*args);
        throw;
      }
    });
  }, "f, called once more if it raises before the error goes on. Unlike Python code it cannot be interrupted before its first line.");
  m.def("simd", [] { return cpu::level_name(cpu::level()); }, "The SIMD level in use.");
  m.def("set_simd", set_simd, "Use another SIMD level, for tests and benchmarks.");
  m.def("simd_levels", [] {
    pybind11::list names;
    for (cpu::Level l : {cpu::Level::portable, cpu::Level::avx2, cpu::Level::avx512})
      if (cpu::supports(l)) names.append(cpu::level_name(l));
    return names;
  }, "The SIMD levels that this machine can run.");
}

}  // namespace flatops
