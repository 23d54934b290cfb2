// From PyTorch's tensors to the kernels, on any device. Only this file and bindings.cpp include torch. Schemas are in
// flatops/reference.py, and flatops/ops.py checks arguments for all backends; the checks here are those that memory
// safety needs.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>

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

// Tensors as the kernels see them: those whose filters are not contiguous are copied, and copied back.
class Operands {
 public:
  explicit Operands(const at::TensorList& tensors) : tensors_(tensors) {}

  // What a kernel reads (and changes, until write_back) instead of tensor i.
  void* data(size_t i) { return at(tensors_, i, tensors_[i], copies_); }

  // Another tensor of the same shape, in the storage order of tensor i.
  void* like(size_t i, const at::Tensor& other, std::vector<std::pair<at::Tensor, at::Tensor>>& copies) {
    TORCH_CHECK(other.sizes() == tensors_[i].sizes() && other.device() == tensors_[i].device(),
                "flatops: tensors ", i, " differ in shape or device");
    return at(tensors_, i, other, copies);
  }

  static void write_back(const std::vector<std::pair<at::Tensor, at::Tensor>>& copies) {
    for (const auto& [view, copy] : copies) view.copy_(copy);
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

// An operator's arguments. `data` are the tensors that define the filters; the other lists are as long, or empty.
struct Given {
  at::TensorList data, grads, scores;
  at::TensorList backup;  // under a mask: one tensor, or none
  at::TensorList fisher;
  at::IntArrayRef index, first_row;
  std::optional<at::Tensor> mask;
};

// What a launch needs of its tensors, and the copies of those that are not contiguous. Place says where it runs:
//     Place(at::Device), Place::type: a device type, place.where: what the operators of ops.h take as `where`
template <class Place>
struct Launch {
  at::Device device;
  Place place;
  at::AutoDispatchBelowADInplaceOrView below_autograd;  // autograd must not see the copies
  Operands operands;
  TensorList list;

  explicit Launch(const Given& given)
      : device(given.data.empty() ? at::Device(Place::type) : given.data[0].device()), place(device), operands(given.data) {
    const auto& [data, grads, scores, backup, fisher, index, first_row, mask] = given;
    const size_t n = data.size();
    TORCH_CHECK(device.type() == Place::type, "flatops: tensors are on ", device, ", expected ", Place::type);
    const auto fits = [n](const auto& list) { return list.empty() || list.size() == n; };
    TORCH_CHECK(fits(grads) && fits(scores) && (mask ? backup.size() < 2 : fits(backup)) && fits(fisher) && fits(index) &&
                    fits(first_row),
                "flatops: lists differ in length");
    list.tensors.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor& t = data[i];
      TORCH_CHECK(t.device() == device, "flatops: tensor ", i, " is on ", t.device(), ", expected ", device);
      const bool one_dim = t.dim() <= 1;
      const int64_t filters = t.numel() == 0 ? 0 : one_dim ? 1
                                                           : t.size(0);
      float* f = nullptr;
      if (!fisher.empty()) {
        const at::Tensor& q = fisher[i];
        TORCH_CHECK(q.scalar_type() == at::kFloat && q.is_contiguous() && q.numel() == (t.dim() ? t.size(0) : 1) &&
                        q.device() == device,
                    "flatops: fisher ", i, " must be a contiguous float32 tensor with one entry per slice along dim 0, on ", device);
        f = q.data_ptr<float>();
      }
      list.tensors.push_back({.data = operands.data(i),
                              .grad = grads.empty() ? nullptr : operands.like(i, grads[i], read_),
                              .scores = scores.empty() ? nullptr : operands.like(i, scores[i], read_),
                              .backup = backup.empty() || mask ? nullptr : operands.like(i, backup[i], backups_),
                              .fisher = f,
                              .filters = filters,
                              .length = filters ? t.numel() / filters : 0,
                              .first_filter = list.filters,
                              .index = uint32_t(index.empty() ? i : index[i]),
                              .first_row = first_row.empty() ? 0 : uint32_t(first_row[i]),
                              .dtype = dtype_of(t),
                              .one_dim = one_dim});
      list.filters += filters;
    }
    if (mask) give_mask(*mask, backup);
  }

  // Every tensor's part of a mask, and the backup under it.
  void give_mask(const at::Tensor& mask, const at::TensorList& backup) {
    int64_t size = 0, rank = 0;
    for (const Tensor& t : list.tensors) rank += words(t.numel()), size += words(t.numel()) + ranks(t.numel());
    uint32_t* const data = (uint32_t*)array<int32_t>(mask, size, "mask");
    int64_t word = 0;
    for (Tensor& t : list.tensors) {
      t.bits = data + word, t.ranks = data + rank;
      word += words(t.numel()), rank += ranks(t.numel());
    }
    if (backup.empty()) return;
    TORCH_CHECK(backup[0].is_contiguous() && backup[0].dim() == 1 && backup[0].device() == device,
                "flatops: under a mask, backup must be one contiguous row on ", device);
    list.masked_backup = {
        .data = backup[0].data_ptr(), .width = int64_t(backup[0].element_size()), .slots = backup[0].numel()};
    for (const Tensor& t : list.tensors)
      TORCH_CHECK(size_of(t.dtype) <= list.masked_backup.width, "flatops: the backup's dtype is narrower than a parameter's");
  }

  // Two tensors over the same memory would be changed twice and backed up in between, which no backup could undo.
  void check_disjoint(const char* name) const {
    std::vector<std::pair<const char*, size_t>> starts;
    for (size_t i = 0; i < list.tensors.size(); ++i)
      if (list.tensors[i].filters) starts.emplace_back((const char*)list.tensors[i].data, i);
    std::sort(starts.begin(), starts.end());
    for (size_t k = 1; k < starts.size(); ++k) {
      const Tensor& t = list.tensors[starts[k - 1].second];
      TORCH_CHECK_VALUE(starts[k - 1].first + t.numel() * size_of(t.dtype) <= starts[k].first, name, "[", starts[k - 1].second, "] and ",
                        name, "[", starts[k].second, "] share memory: pass it once");
    }
  }

  // Numbers that the kernels read on their device.
  template <class T> T* scalar(const at::Tensor& t, const char* name) const { return array<T>(t, 1, name); }
  Noise noise(const at::Tensor& key, const at::Tensor& draw) const {
    return {.key = scalar<int64_t>(key, "key"), .draw = scalar<int64_t>(draw, "draw")};
  }
  float* per_filter(const at::Tensor& scales) const { return array<float>(scales, list.filters, "scales"); }
  template <class T> T* array(const at::Tensor& t, int64_t n, const char* name) const {
    constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
    TORCH_CHECK(t.numel() == n && t.scalar_type() == dtype && t.is_contiguous() && t.device() == device, "flatops: ", name,
                " must be ", n, " contiguous ", dtype, " on ", device);
    return t.data_ptr<T>();
  }

  at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype) const {
    return at::empty(size, at::TensorOptions().dtype(dtype).device(device));
  }

  // Copies back what was copied, and moves version counters on.
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
  std::vector<std::pair<at::Tensor, at::Tensor>> read_, backups_;
};

template <class Place>
at::Tensor filter_norms(at::TensorList params) {
  Launch<Place> launch({.data = params});
  at::Tensor out = launch.empty({launch.list.filters}, at::kFloat);
  flatops::filter_norms(launch.list, out.data_ptr<float>(), launch.place.where);
  return out;
}

template <class Place>
void perturb_(at::TensorList params, at::Tensor scales, at::TensorList backup, const at::Tensor& sigma,
              const at::Tensor& key, const at::Tensor& draw, at::IntArrayRef index, at::IntArrayRef first_row,
              at::TensorList fisher, double eta) {
  Launch<Place> launch({.data = params, .backup = backup, .fisher = fisher, .index = index, .first_row = first_row});
  launch.check_disjoint("params");
  flatops::perturb_(launch.list, launch.per_filter(scales), launch.template scalar<double>(sigma, "sigma"),
                    launch.noise(key, draw), eta, launch.place.where);
  launch.wrote(params);
  Launch<Place>::bump(backup);
  Launch<Place>::bump({scales});
}

template <class Place>
void restore_(at::TensorList params, at::TensorList backup, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(backup.size() == (mask ? 1 : params.size()), "flatops: lists differ in length");
  Launch<Place> launch({.data = params, .backup = backup, .mask = mask});
  flatops::restore_(launch.list, launch.place.where);
  launch.wrote(params);
}

template <class Place>
void subtract_noise_(at::TensorList params, const at::Tensor& scales, const at::Tensor& key, const at::Tensor& draw,
                     at::IntArrayRef index, at::IntArrayRef first_row, at::TensorList fisher, double eta) {
  Launch<Place> launch({.data = params, .fisher = fisher, .index = index, .first_row = first_row});
  flatops::subtract_noise_(launch.list, launch.per_filter(scales), launch.noise(key, draw), eta, launch.place.where);
  launch.wrote(params);
}

template <class Place>
void normal_(at::Tensor out, const at::Tensor& key, const at::Tensor& draw, int64_t index) {
  TORCH_CHECK(out.scalar_type() == at::kFloat, "flatops: normal_ fills float32");
  const std::vector<at::Tensor> outs{out};
  Launch<Place> launch({.data = outs, .index = index});
  flatops::normal_(launch.list, launch.noise(key, draw), launch.place.where);
  launch.wrote(outs);
}

template <class Place>
void filter_fisher_(at::TensorList fisher, at::TensorList grads, double beta, const at::Tensor& scale) {
  Launch<Place> launch({.data = grads, .fisher = fisher});
  flatops::filter_fisher_(launch.list, beta, launch.template scalar<double>(scale, "scale"), launch.place.where);
  Launch<Place>::bump(fisher);
}

template <class Place>
at::Tensor grad_norm(at::TensorList grads, at::TensorList params) {
  Launch<Place> launch({.data = params.empty() ? grads : params, .grads = params.empty() ? at::TensorList{} : grads});
  at::Tensor out = launch.empty({}, at::kDouble);
  flatops::grad_norm(launch.list, !params.empty(), out.data_ptr<double>(), launch.place.where);
  return out;
}

template <class Place>
void ascend_(at::TensorList params, at::TensorList grads, at::TensorList backup, const std::optional<at::Tensor>& mask,
             const at::Tensor& rho, const at::Tensor& norm, bool adaptive) {
  TORCH_CHECK(grads.size() == params.size(), "flatops: lists differ in length");
  Launch<Place> launch({.data = params, .grads = grads, .backup = backup, .mask = mask});
  launch.check_disjoint("params");
  flatops::ascend_(launch.list, launch.template scalar<double>(rho, "rho"), launch.template scalar<double>(norm, "norm"),
                   adaptive, launch.place.where);
  launch.wrote(params);
  Launch<Place>::bump(backup);
}

template <class Place>
void fisher_(at::TensorList fisher, at::TensorList grads, const at::Tensor& scale) {
  TORCH_CHECK(grads.size() == fisher.size(), "flatops: lists differ in length");
  Launch<Place> launch({.data = fisher, .grads = grads});
  for (const Tensor& t : launch.list.tensors) TORCH_CHECK(t.dtype == DType::f32, "flatops: fisher_ adds to float32");
  flatops::fisher_(launch.list, launch.template scalar<double>(scale, "scale"), launch.place.where);
  launch.wrote(fisher);
}

template <class Place>
std::tuple<at::Tensor, at::Tensor> topk_mask(at::TensorList scores, int64_t k) {
  Launch<Place> launch({.data = scores});
  int64_t size = 0, elements = 0;
  for (Tensor& t : launch.list.tensors) {
    t.scores = t.data;
    size += words(t.numel()) + ranks(t.numel()), elements += t.numel();
  }
  TORCH_CHECK(0 <= k && k <= elements, "flatops: k must lie in [0, ", elements, "], not ", k);
  at::Tensor mask = launch.empty({size}, at::kInt), bad = launch.empty({}, at::kLong);
  launch.give_mask(mask, {});
  flatops::topk_mask(launch.list, k, bad.data_ptr<int64_t>(), launch.place.where);
  return {mask, bad};
}

template <class Place>
at::Tensor regrow_mask_(at::Tensor mask, at::TensorList params, at::TensorList drop, at::TensorList grow, const at::Tensor& key,
                        const at::Tensor& draw, at::IntArrayRef index, int64_t count) {
  Launch<Place> drops({.data = params, .scores = drop, .index = index, .mask = mask});
  Launch<Place> grows({.data = params, .scores = grow, .index = index, .mask = mask});
  TORCH_CHECK(count >= 0, "flatops: count must be >= 0, not ", count);
  at::Tensor bad = drops.empty({}, at::kLong);
  flatops::regrow_mask_(drops.list, grows.list, {.drop = drop.empty(), .grow = grow.empty()}, drops.noise(key, draw), count,
                        bad.data_ptr<int64_t>(), drops.place.where);
  Launch<Place>::bump({mask});
  return bad;
}

// Registers every operator for one place.
template <class Place> void implement(torch::Library& m) {
  m.impl("filter_norms", filter_norms<Place>);
  m.impl("perturb_", perturb_<Place>);
  m.impl("restore_", restore_<Place>);
  m.impl("subtract_noise_", subtract_noise_<Place>);
  m.impl("normal_", normal_<Place>);
  m.impl("filter_fisher_", filter_fisher_<Place>);
  m.impl("grad_norm", grad_norm<Place>);
  m.impl("ascend_", ascend_<Place>);
  m.impl("fisher_", fisher_<Place>);
  m.impl("topk_mask", topk_mask<Place>);
  m.impl("regrow_mask_", regrow_mask_<Place>);
}

}  // namespace
}  // namespace flatops
