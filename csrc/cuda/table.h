// The table of tensors that a launch takes by value, how a list is cut into tables, and which block works on what.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "ops.h"

namespace flatops::cuda {

constexpr int WARP = 32, WARPS = 8, THREADS = WARP * WARPS;
constexpr int STEPS = REDUCE / LANES;         // a warp's lanes take four neighbours each: LANES per step, REDUCE in all
constexpr int64_t TILE = WARPS * REDUCE;      // elements that a block holds in registers; a longer filter is split

// A tensor in a table. Small, because kernel parameters are limited to 32,764 bytes.
struct Entry {
  void* data;
  const void* other;      // the gradient, or ARWP's Fisher
  void* backup;           // or null
  int64_t length;         // of a filter
  uint32_t filters;
  uint32_t first_filter;  // position of the tensor's values in per-filter arrays
  uint32_t index;         // `tensor` in the noise's counter; for sums over parts of filters, their position
  uint32_t first_row;     // of a shard: its first `filter` in the noise's counter
  uint32_t first_block;
  bool aligned;           // four neighbours can be loaded and stored at once
  bool one_dim;

  __device__ const float* fisher() const { return (const float*)other; }
};
static_assert(sizeof(Entry) == 56);

template <int N, class E = Entry>
struct Table {
  int32_t count;
  E entries[N];

  __device__ const E& find(uint32_t block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (entries[middle].first_block <= block) low = middle;
      else high = middle - 1;
    }
    return entries[low];
  }
};

// A table is copied at every launch, so a short list gets a short table.
constexpr int SHORT_TABLE = 168, LONG_TABLE = 580;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// log2 of the threads that share a filter of up to TILE elements: a part of a warp, a warp, or several.
__host__ __device__ inline int share_log2(int64_t length) {
  const int64_t shares = length <= LANES ? ceil_div(length, 4) : WARP * ceil_div(length, REDUCE);
  int log2 = 0;
  while (1 << log2 < shares) ++log2;
  return log2;
}

// The number of blocks for `filters` filters: several filters per block, or several blocks per filter.
inline int64_t blocks_for(int64_t filters, int64_t length) {
  if (length > TILE) return filters * ceil_div(length, TILE);
  return ceil_div(filters, THREADS >> share_log2(length));
}

// How many elements are left, and how many of them can be loaded and stored four at a time: all or none.
struct Left {
  int elements, vector;
  __device__ Left operator-(int n) const { return {elements - n, vector - n}; }
};

// A thread's work: the elements of a filter from `offset` on, four in every step of LANES.
struct Share {
  int64_t filter, offset;
  Left left;       // to the filter's end, at most TILE; <= 0 if there is nothing to do
  int group;       // threads of this warp that share the filter
  int warps;       // warps that share the filter
  bool first;      // of the filter's threads
};

// With `part`, a filter is split over blocks even if it is not long.
__device__ inline Share share(const Entry& e, uint32_t block, bool part) {
  const int thread = threadIdx.x;
  const int64_t length = e.length;
  Share s;
  if (part) {
    const uint32_t parts = uint32_t(ceil_div(length, TILE));
    s.filter = parts ? block / parts : 0;
    s.group = WARP, s.warps = WARPS, s.first = thread == 0;
    s.offset = int64_t(block - uint32_t(s.filter) * parts) * TILE + thread / WARP * REDUCE + thread % WARP * 4;
  } else {
    const int log2 = share_log2(length), threads = 1 << log2, mine = thread & (threads - 1);
    s.filter = (int64_t(block) * THREADS + thread) >> log2;
    s.group = min(threads, WARP), s.warps = max(threads / WARP, 1), s.first = mine == 0;
    s.offset = s.filter < e.filters ? mine / WARP * REDUCE + mine % WARP * 4 : length;
  }
  s.left.elements = int(min(length - s.offset, TILE));
  s.left.vector = e.aligned ? s.left.elements : 0;
  return s;
}

// --- on the host -----------------------------------------------------------------------------------------------------

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string message = std::string("flatops: a CUDA launch failed: ") + cudaGetErrorString(error);
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver < 12010)
    message += "; the driver knows CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
               " and tables of tensors need 12.1 or later: update it to version 530 or later";
  else if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    message += "; flatops info lists the architectures that it was compiled for: set TORCH_CUDA_ARCH_LIST and install it again";
  throw std::runtime_error(message);
}

// Whether four neighbours can be loaded and stored at once in arrays of a dtype at these addresses.
inline bool are_aligned(DType dtype, std::initializer_list<const void*> starts) {
  const uintptr_t size = size_of(dtype), four = size < 4 ? 4 * size : 16;
  return std::all_of(starts.begin(), starts.end(), [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % four == 0; });
}

inline Entry entry(const Tensor& t) {
  if (t.filters > int64_t(UINT32_MAX) || t.first_filter + t.filters > int64_t(UINT32_MAX))
    throw std::invalid_argument("flatops: more than 2^32 filters in one list: pass fewer tensors a call");
  const bool aligned = are_aligned(t.dtype, {t.data, t.grad, t.backup}) && (t.length % 4 == 0 || t.filters == 1);
  return {.data = t.data, .other = t.grad ? t.grad : t.fisher, .backup = t.backup, .length = t.length, .filters = uint32_t(t.filters), .first_filter = uint32_t(t.first_filter), .index = t.index, .first_row = t.first_row, .aligned = aligned, .one_dim = t.one_dim};
}

// The same tensor with all its elements as one filter, for kernels that ignore filters.
inline Entry flat(const Tensor& t) {
  Tensor whole = t;
  whole.length = t.numel();
  whole.filters = 1;
  return entry(whole);
}

// Entries for one kernel, with the number of blocks for each.
template <class E = Entry>
struct Work {
  std::vector<E> entries;
  std::vector<int64_t> blocks;

  void add(const E& e, int64_t n) {
    if (n) entries.push_back(e), blocks.push_back(n);
  }
};

template <int N, class E, class KernelOf, class... Args>
void launch_tables(const Work<E>& work, const Gpu& gpu, KernelOf kernel_of, const Args&... args) {
  const auto kernel = kernel_of(std::integral_constant<int, N>{});
  for (size_t i = 0; i < work.entries.size();) {
    Table<N, E> table;
    int64_t blocks = 0;
    table.count = 0;
    for (; i < work.entries.size() && table.count < N && blocks + work.blocks[i] <= INT32_MAX; ++i) {
      table.entries[table.count] = work.entries[i];
      table.entries[table.count++].first_block = uint32_t(blocks);
      blocks += work.blocks[i];
    }
    if (!table.count) throw std::invalid_argument("flatops: a tensor needs more than 2^31 blocks");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(THREADS);
    config.stream = (cudaStream_t)gpu.stream;
    check(cudaLaunchKernelEx(&config, kernel, table, args...));
  }
}

// Launches kernel_of(capacity)(table, args...) on all entries: once, unless they need several tables.
template <class E, class KernelOf, class... Args>
void launch(const Work<E>& work, const Gpu& gpu, KernelOf kernel_of, const Args&... args) {
  if (work.entries.size() <= SHORT_TABLE) launch_tables<SHORT_TABLE>(work, gpu, kernel_of, args...);
  else launch_tables<LONG_TABLE>(work, gpu, kernel_of, args...);
}

}  // namespace flatops::cuda
