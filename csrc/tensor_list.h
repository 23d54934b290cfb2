// A list of tensors as kernels see it: memory, filters, lengths, and the blocks of work.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace flatops {

enum class DType : int32_t { f32,
                             bf16,
                             f16,
                             f64 };
constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4
                                                                                              : 2; }

// A tensor with contiguous filters (slices along dim 0): `filters` rows of `length` elements.
// A tensor with at most one dimension is one filter.
struct Tensor {
  void* data;              // [filters, length]; the operator changes or reads it
  const void* grad;        // [filters, length] or null; of `data`'s dtype
  const void* scores;      // [filters, length] or null; the scores of a mask, of `data`'s dtype
  void* backup;            // [filters, length] or null; of `data`'s dtype. Under a mask: see MaskedBackup
  float* fisher;           // [filters], for one-dimensional tensors [length]; or null
  uint32_t* bits;          // the tensor's part of a mask: one bit an element, in storage order; or null
  uint32_t* ranks;         // for every REDUCE elements the number of ones before them in the list; or null
  int64_t filters, length;
  int64_t first_filter;    // position of filter 0 in per-filter arrays over the whole list
  uint32_t index;          // the parameter's position in the optimizer; `tensor` in the noise's counter
  uint32_t first_row;      // of a shard: the index of filter 0 in the whole parameter, for the noise's counter
  DType dtype;
  bool one_dim;            // dim() <= 1

  int64_t numel() const { return filters * length; }
};

// The backup of a list under a mask: a slot for each selected weight, in order.
struct MaskedBackup {
  void* data;     // null: no backup
  int64_t width;  // bytes per slot, as the list's widest dtype has
  int64_t slots;
};

// A mask over a list is the words of all tensors, one after the other, and then the ranks of all.
constexpr int64_t words(int64_t elements) { return (elements + 31) / 32; }
constexpr int64_t ranks(int64_t elements) { return (elements + 1023) / 1024; }

// All sums: REDUCE elements at a time, in LANES running sums, folded by halves (reference.py: total, sum_squares).
constexpr int64_t REDUCE = 1024, LANES = 128;

// Work for one thread: whole filters, or a part (of whole REDUCEs) of a filter too long for one block.
constexpr int64_t BLOCK = 32 * REDUCE;

struct Block {
  int32_t tensor;
  bool part;               // of a long filter, whose sum needs the parts of other blocks
  int64_t filter, filters; // [filter, filter + filters)
  int64_t start, length;   // within the filter
  int64_t first_sum;       // of a part: the position of the sums of its REDUCEs
};

struct TensorList {
  std::vector<Tensor> tensors;
  std::vector<Block> blocks;
  int64_t filters = 0;     // in the whole list
  int64_t sums = 0;        // REDUCEs in all long filters
  MaskedBackup masked_backup{};

  bool masked() const { return !tensors.empty() && tensors[0].bits; }

  // Cuts the list into blocks. With `whole`, a tensor counts as one filter (sums over everything need no filters).
  void cut(bool whole = false) {
    blocks.clear();
    sums = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& t = tensors[i];
      const int64_t filters = whole ? 1 : t.filters, length = whole ? t.numel() : t.length;
      if (t.numel() == 0) continue;
      if (whole || length > BLOCK) {
        for (int64_t f = 0; f < filters; ++f)
          for (int64_t start = 0; start < length; start += BLOCK) {
            const int64_t n = std::min(BLOCK, length - start);
            blocks.push_back({.tensor = int32_t(i), .part = true, .filter = f, .filters = 1, .start = start, .length = n, .first_sum = sums});
            sums += (n + REDUCE - 1) / REDUCE;
          }
      } else {
        const int64_t step = std::max<int64_t>(1, BLOCK / length);
        for (int64_t f = 0; f < filters; f += step)
          blocks.push_back({.tensor = int32_t(i), .filter = f, .filters = std::min(step, filters - f), .length = length});
      }
    }
  }
};

}  // namespace flatops
