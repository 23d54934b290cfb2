// Sums of squares per filter and over the whole list: filter_norms, grad_norm, and those for other operators.
#define FLATOPS_FILE "cpu/sum.cpp"
#include "cpu/each_level.h"

#ifdef FLATOPS_LEVEL

template <class T>
static void sum_block_of(const Tensor& t, const Block& b, bool product, double* filter_sums, double* part_sums) {
  if (b.part) {
    const int64_t at = b.filter * t.length + b.start;
    sum_tiles<true>((const T*)t.data + at, product ? (const T*)t.grad + at : nullptr, b.length, part_sums + b.first_sum);
    return;
  }
  const T* x = (const T*)t.data + b.filter * b.length;
  for (int64_t f = 0; f < b.filters; ++f, x += b.length) filter_sums[t.first_filter + b.filter + f] = sum_filter<true>(x, b.length);
}

// Whole filters go to filter_sums; the parts of long ones, REDUCE by REDUCE, to part_sums.
static void sum_block(const Tensor& t, const Block& b, bool product, double* filter_sums, double* part_sums) {
  FLATOPS_BY_DTYPE(t.dtype, sum_block_of, t, b, product, filter_sums, part_sums)
}

#else

#include <memory>

#include "cpu/filter_sums.h"

namespace flatops::cpu {

// Adds up the parts of each long filter.
static void fold_parts(const TensorList& list, double* part_sums, double* filter_sums) {
  const auto sum_sums = FLATOPS_BEST(sum_sums);
  for (size_t i = 0; i < list.blocks.size(); ++i) {
    const Block& b = list.blocks[i];
    if (!b.part || b.start != 0) continue;
    size_t last = i;
    while (last + 1 < list.blocks.size() && list.blocks[last + 1].part && list.blocks[last + 1].start != 0) ++last;
    const Block& e = list.blocks[last];
    const int64_t n = e.first_sum + (e.length + REDUCE - 1) / REDUCE - b.first_sum;
    filter_sums[list.tensors[b.tensor].first_filter + b.filter] = sum_sums(part_sums + b.first_sum, n);
  }
}

void long_filter_sums(const TensorList& list, double* filter_sums, const Parallel& parallel) {
  if (!list.sums) return;
  const auto sum_block = FLATOPS_BEST(sum_block);
  const auto part_sums = std::make_unique<double[]>(list.sums);
  parallel(list.blocks.size(), [&](int64_t i) {
    const Block& b = list.blocks[i];
    if (b.part) sum_block(list.tensors[b.tensor], b, false, nullptr, part_sums.get());
  });
  fold_parts(list, part_sums.get(), filter_sums);
}

std::vector<double> filter_sums(TensorList& list, const Parallel& parallel) {
  list.cut();
  std::vector<double> sums(list.filters), part_sums(list.sums);
  const auto sum_block = FLATOPS_BEST(sum_block);
  parallel(list.blocks.size(), [&](int64_t i) {
    const Block& b = list.blocks[i];
    sum_block(list.tensors[b.tensor], b, false, sums.data(), part_sums.data());
  });
  fold_parts(list, part_sums.data(), sums.data());
  return sums;
}

}  // namespace flatops::cpu

namespace flatops {

template <> void filter_norms(TensorList& list, float* out, const Parallel& parallel) {
  const std::vector<double> sums = cpu::filter_sums(list, parallel);
  for (size_t f = 0; f < sums.size(); ++f) out[f] = std::sqrt(float(sums[f]));
}

template <> void grad_norm(TensorList& list, bool adaptive, double* out, const Parallel& parallel) {
  list.cut(/*whole=*/true);
  for (size_t i = 0; i < list.tensors.size(); ++i) list.tensors[i].first_filter = int64_t(i);
  const auto sum_block = FLATOPS_BEST(sum_block);
  const auto part_sums = std::make_unique<double[]>(list.sums);
  parallel(list.blocks.size(), [&](int64_t i) {
    const Block& b = list.blocks[i];
    sum_block(list.tensors[b.tensor], b, adaptive, nullptr, part_sums.get());
  });
  std::vector<double> sums(list.tensors.size());
  cpu::fold_parts(list, part_sums.get(), sums.data());
  *out = std::sqrt(FLATOPS_BEST(sum_sums)(sums.data(), int64_t(sums.size())));
}

}  // namespace flatops
#endif
