// topk_mask and regrow_mask_: the elements with the k largest scores of a whole list, exactly k, ties to the first.
//
// Scores become keys, integers in the same order, and the threshold is found BIN_BITS at a time: a histogram of these
// bits over all keys with the threshold's upper bits tells which bin it is in. The second pass marks the keys above the
// first bin, and copies those in it, a few per cent: later passes read nothing else. If a REDUCE has more of them than
// there is room for, for instance because many scores are equal, its scores are read again instead. Last, of the
// elements equal to the threshold the first are chosen, by a prefix sum over all blocks of the list. Zeros, often most
// of the scores, are counted separately: a threshold of zero is known after the first pass, and the others have almost
// nothing to do.
//
// The last block of a pass to finish (it takes the last ticket) computes the state for the next launch.
#include "mask.h"

#include "noise.h"

namespace flatops::cuda {
namespace {

constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;
constexpr int ROOM = 128;  // candidates that are copied per REDUCE
constexpr int OFFSET_BITS = 10;
static_assert(REDUCE == 1 << OFFSET_BITS);

// Scores that are not negative have the order of their bits, without the sign.
template <class Key> constexpr int KEY_BITS = 8 * sizeof(Key) - 1;
template <class Key> constexpr Key ALL_BITS = (Key(1) << KEY_BITS<Key>)-1;
template <class Key> constexpr int PASSES = (KEY_BITS<Key> + BIN_BITS - 1) / BIN_BITS;

// A pass uses the bits from here up to those of the pass before it.
template <class Key> __host__ __device__ constexpr int shift_of(int pass) {
  const int shift = KEY_BITS<Key> - BIN_BITS * (pass + 1);
  return shift < 0 ? 0 : shift;
}

// Shared by all blocks, cleared by the host.
template <class Key> struct alignas(8) State {
  uint32_t bins[PASSES<Key>][BINS];
  uint32_t tickets[PASSES<Key> + 1];
  uint32_t bad;      // ~index of the first tensor with a bad score; 0: none
  uint32_t missing;  // how many of the keys with the threshold's upper bits are to be chosen
  uint32_t zeros;    // among all keys
  uint32_t exact;    // the threshold is known
  Key threshold;     // its upper bits, as far as they are known
};

// A tensor as one row of elements.
struct ScoresEntry {
  const void* scores;    // null: random
  int64_t elements;
  uint32_t first_word;   // of the tensor, in the mask
  uint32_t first_rank;
  uint32_t first_tile;   // in the list, over all launches
  uint32_t tensor;       // its index in the list
  uint32_t index;        // `tensor` in the noise's counter
  uint32_t first_block;
  bool aligned;          // four neighbours can be loaded at once
};
template <int N> using ScoresTable = Table<N, ScoresEntry>;

// One choice among scores.
template <class Key> struct Choice {
  State<Key>* state;          // followed by the scratch memory
  uint32_t* marks;            // the words for the bits of what is chosen
  uint32_t* ranks;            // and their ranks
  const uint32_t* among;      // the words of elements to choose from, or null: all
  Noise noise;
  uint32_t blocks;            // in all launches of a pass
  uint32_t place;             // of random scores: in the counter, larger than any filter
  bool dead;                  // choose among those whose bit is not set
  bool lowest;                // choose the lowest scores
  bool magnitudes;            // choose by |score|

  // [blocks] over all blocks before one, chosen and << 32 equal to the threshold
  __device__ uint64_t* before() const { return (uint64_t*)(state + 1); }
  // [blocks, WARPS, ROOM] lower bits of the key, then the place in the REDUCE
  __device__ Key* candidates() const { return (Key*)(before() + blocks); }
  // [blocks, WARPS] certainly chosen in a REDUCE, and << 16: candidates, in the end those equal to the threshold
  __device__ uint32_t* found() const { return (uint32_t*)(candidates() + int64_t(blocks) * WARPS * ROOM); }
  // [blocks] the same over a block
  __device__ uint32_t* block_found() const { return found() + int64_t(blocks) * WARPS; }

  static int64_t scratch(int64_t blocks) {
    return sizeof(State<Key>) +
           blocks * (sizeof(uint64_t) + WARPS * (ROOM * sizeof(Key) + sizeof(uint32_t)) + sizeof(uint32_t));
  }

  __device__ Key flip() const { return lowest ? ALL_BITS<Key> : 0; }  // a zero's key, too
};

// The block's position in the list, over all launches.
__device__ uint32_t block_of(const ScoresEntry& e) { return e.first_tile + (blockIdx.x - e.first_block); }

__device__ uint32_t bits_of(float x) { return uint32_t(__float_as_int(x)); }
__device__ uint64_t bits_of(double x) { return uint64_t(__double_as_longlong(x)); }
template <class Key> constexpr Key INFINITE = sizeof(Key) == 4 ? Key(0x7f800000) : Key(0x7ff0000000000000);

// The flags of a lane's elements to choose from.
template <class Key> __device__ uint32_t eligible(const ScoresEntry& e, const Part& part, const Choice<Key>& choice) {
  uint32_t word = part.inside();
  if (choice.among && part.has_word()) word &= choice.among[e.first_word + part.word()] ^ (choice.dead ? ~0u : 0u);
  return flags_of(word);
}

// A lane's keys, of K steps from `first` on, and the flags of bad scores; garbage beyond the end.
template <class T, bool RANDOM, class Key, int K>
__device__ __forceinline__ uint32_t load_keys(Key (&x)[K][4], int first, const ScoresEntry& e, const Part& part,
                                              const Choice<Key>& choice) {
  const Key flip = choice.flip();
  uint32_t bad = 0;
  if constexpr (RANDOM) {
    const uint64_t key = uint64_t(*choice.noise.key);
    const PhiloxKeys keys = philox_keys(key);
    const PhiloxFilter filter = philox_filter(key, choice.place, e.index, uint32_t(*choice.noise.draw));
    const uint32_t block = uint32_t(uint64_t(part.start()) / 4) + first * uint32_t(LANES / 4);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Philox<1> p;
      p.start(keys, filter, block + k * (LANES / 4), 0);
      p.rounds(keys, 2, 10);
      const uint32_t words[4] = {p.c0[0], p.c1[0], p.c2[0], p.c3[0]};
#pragma unroll
      for (int c = 0; c < 4; ++c) x[k][c] = Key(words[c] >> 8 << 7) ^ flip;  // 24 bits, the upper bits of a key
    }
  } else {
    Four<T> v[K];
    load<LANES>(v, (const T*)e.scores + part.start() + first * LANES, part.left - first * int(LANES));
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Key bits = bits_of(widen(v[k].x[c])), magnitude = bits & ALL_BITS<Key>;
        const bool wrong = choice.magnitudes ? magnitude > INFINITE<Key> : bits > INFINITE<Key> && magnitude;
        bad |= uint32_t(wrong) << (4 * (first + k) + c);
        x[k][c] = magnitude ^ flip;
      }
  }
  return bad;
}

// --- histograms ------------------------------------------------------------------------------------------------------

// A block's histogram. Each lane counts its own zeros, often most of the scores, so that lanes do not wait for one bin.
struct Histogram {
  uint32_t* bins;  // [BINS], shared
  int shift;
  uint32_t mask;
  uint32_t zeros = 0;

  template <class Key> __device__ static Histogram of(uint32_t* bins, const Choice<Key>&, int pass) {
    const int shift = shift_of<Key>(pass);
    return {bins, shift, (1u << (shift_of<Key>(pass - 1) - shift)) - 1};
  }
  __device__ void clear() {
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
  }
  template <class Key> __device__ uint32_t bin(Key key) const { return uint32_t(key >> shift) & mask; }
  template <class Key> __device__ void add(Key key) const { atomicAdd(bins + bin(key), 1u); }
  // The keys of K steps whose flag is set.
  template <class Key, int K> __device__ void add(const Key (&x)[K][4], uint32_t flags, Key zero) {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (flags >> (4 * k + c) & 1) {
          if (x[k][c] == zero) ++zeros;
          else add(x[k][c]);
        }
  }
  template <class Key> __device__ void add_zeros(Key zero) {
    if (zeros) atomicAdd(bins + bin(zero), zeros);
  }
  __device__ void flush(uint32_t* to) const {
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS)
      if (bins[i]) atomicAdd(to + i, bins[i]);
  }
};

// The sum over the threads before this one, and over all. All threads of the block must call it.
__device__ uint64_t sum_before_in_block(uint64_t x, uint64_t& all) {
  __shared__ uint64_t warps[WARPS];
  const int warp = threadIdx.x / WARP;
  uint64_t before = sum_before(x);
  __syncthreads();  // the previous contents have been read
  if (threadIdx.x % WARP == WARP - 1) warps[warp] = before + x;
  __syncthreads();
  all = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    if (i == warp) before += all;
    all += warps[i];
  }
  return before;
}

// Whether this block is the last of a pass to finish; then it sees all that the others wrote.
__device__ bool is_last(uint32_t* ticket, uint32_t blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// How many to choose: `count`, but to move ones among `elements`, not more than there are ones, or zeros.
struct Wanted {
  uint32_t count, elements;  // elements: 0 for no limit
  __device__ uint32_t among(uint32_t eligible) const {
    return elements ? min(count, min(eligible, elements - eligible)) : count;
  }
};

// The bin of the threshold: the first from the top that, with those above it, holds enough.
template <class Key> __device__ void find_bin(State<Key>* state, int pass, const Wanted* wanted, bool lowest) {
  constexpr int MINE = BINS / THREADS;
  const int top = BINS - 1 - MINE * threadIdx.x;
  uint32_t n[MINE];
  uint64_t sum = 0, all;
#pragma unroll
  for (int i = 0; i < MINE; ++i) sum += n[i] = state->bins[pass][top - i];
  uint64_t above = sum_before_in_block(sum, all);
  const uint64_t missing = wanted ? wanted->among(uint32_t(all)) : state->missing;
  __syncthreads();  // before it changes
  if (wanted && missing && state->zeros && (lowest ? missing <= state->zeros : missing > all - state->zeros)) {
    if (threadIdx.x == 0) {
      state->exact = 1;
      state->threshold = lowest ? ALL_BITS<Key> : 0;
      state->missing = uint32_t(lowest ? missing : missing - (all - state->zeros));
    }
    return;
  }
  if (missing ? above < missing && missing <= above + sum : threadIdx.x == 0) {
    int i = 0;
    while (i < MINE - 1 && above + n[i] < missing) above += n[i++];
    state->threshold |= Key(top - i) << shift_of<Key>(pass);
    state->missing = uint32_t(missing - above);
  }
}

// --- the passes ------------------------------------------------------------------------------------------------------

// The first pass: all scores. Also finds bad scores; those of an `earlier` choice take precedence.
template <class T, bool RANDOM, class Key, int N>
__global__ void __launch_bounds__(THREADS)
    count_all(const __grid_constant__ ScoresTable<N> table, const Choice<Key> choice, const Wanted wanted,
              const uint32_t* const earlier_bad, int64_t* const bad_tensor) {
  __shared__ uint32_t bins[BINS];
  Histogram histogram = Histogram::of(bins, choice, 0);
  const ScoresEntry& e = table.find(blockIdx.x);
  const Part part(e);
  __shared__ uint32_t zeros;
  if (threadIdx.x == 0) zeros = 0;
  histogram.clear();
  Key x[STEPS][4];
  const uint32_t bad = load_keys<T, RANDOM>(x, 0, e, part, choice), flags = eligible(e, part, choice);
  histogram.add(x, flags, choice.flip());
  histogram.add_zeros(choice.flip());
  if (histogram.zeros) atomicAdd(&zeros, histogram.zeros);
  if (bad & flags) atomicMax(&choice.state->bad, ~e.tensor);
  histogram.flush(choice.state->bins[0]);
  if (threadIdx.x == 0 && zeros) atomicAdd(&choice.state->zeros, zeros);
  if (!is_last(choice.state->tickets, choice.blocks)) return;
  find_bin(choice.state, 0, &wanted, choice.lowest);
  if (threadIdx.x == 0) {
    const uint32_t first = earlier_bad && *earlier_bad ? *earlier_bad : choice.state->bad;
    *bad_tensor = first ? int64_t(~first) : -1;
  }
}

// The second pass: marks the keys above the first bin, copies those in it.
template <class T, bool RANDOM, class Key, int N>
__global__ void __launch_bounds__(THREADS) mark_sure(const __grid_constant__ ScoresTable<N> table, const Choice<Key> choice) {
  constexpr int SHIFT = shift_of<Key>(0);
  static_assert(SHIFT + OFFSET_BITS <= 8 * sizeof(Key));
  __shared__ uint32_t bins[BINS];
  Histogram histogram = Histogram::of(bins, choice, 1);
  histogram.clear();
  const ScoresEntry& e = table.find(blockIdx.x);
  const Part part(e);
  const bool exact = choice.state->exact;
  const int shift = exact ? 0 : SHIFT;
  const Key threshold = choice.state->threshold >> shift;
  Key x[STEPS][4];
  uint32_t sure = 0, within = 0;
  load_keys<T, RANDOM>(x, 0, e, part, choice);
  const uint32_t flags = eligible(e, part, choice);
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Key bits = x[k][c] >> shift;
      sure |= uint32_t(bits > threshold) << (4 * k + c);
      within |= uint32_t(bits == threshold) << (4 * k + c);
    }
  sure &= flags, within &= flags;
  const uint32_t word = word_of(sure);
  if (part.has_word()) choice.marks[e.first_word + part.word()] = word;
  const uint32_t mine = __popc(within), before = sum_before(mine);
  const uint32_t sum = __shfl_sync(WHOLE_WARP, before + mine, WARP - 1), count = sum_warp(uint32_t(__popc(sure)));
  const int64_t warp = int64_t(block_of(e)) * WARPS + threadIdx.x / WARP;
  if (part.lane == 0) choice.found()[warp] = count | sum << 16;
  if (exact) return;
  if (sum <= ROOM) {
    Key* at = choice.candidates() + warp * ROOM + before;
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (within >> (4 * k + c) & 1)
          *at++ = (x[k][c] & ((Key(1) << SHIFT) - 1)) << OFFSET_BITS | Key(k * LANES + 4 * part.lane + c);
  }
  histogram.add(x, within, choice.flip());
  histogram.add_zeros(choice.flip());
  histogram.flush(choice.state->bins[1]);
  if (is_last(choice.state->tickets + 1, choice.blocks)) find_bin(choice.state, 1, nullptr, choice.lowest);
}

// The candidates that mark_sure copied from a REDUCE; all loads are issued at once.
template <class Key> struct Candidates {
  static constexpr int MINE = ROOM / WARP;
  Key x[MINE];
  uint32_t n;

  __device__ Candidates(const Choice<Key>& choice, int64_t warp, uint32_t n) : n(n) {
#pragma unroll
    for (int i = 0; i < MINE; ++i)
      if (const uint32_t at = threadIdx.x % WARP + i * WARP; at < n) x[i] = choice.candidates()[warp * ROOM + at];
  }
  // Calls f(lower bits of the key, position in the REDUCE).
  template <class F> __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < MINE; ++i)
      if (threadIdx.x % WARP + i * WARP < n) f(x[i] >> OFFSET_BITS, uint32_t(x[i]) & (REDUCE - 1));
  }
};

// Later passes: the keys in the last pass's bin.
template <class T, bool RANDOM, class Key, int N>
__global__ void __launch_bounds__(THREADS)
    count_within(const __grid_constant__ ScoresTable<N> table, const Choice<Key> choice, const int pass) {
  __shared__ uint32_t bins[BINS];
  if (choice.state->exact) return;
  const ScoresEntry& e = table.find(blockIdx.x);
  const Part part(e);
  const int shift = shift_of<Key>(pass - 1), warp = threadIdx.x / WARP;
  const Key threshold = choice.state->threshold, low = (Key(1) << shift_of<Key>(0)) - 1;
  const int64_t first = int64_t(block_of(e)) * WARPS;
  const Histogram all = Histogram::of(choice.state->bins[pass], choice, pass);
  uint32_t n = 0;
  bool again = false;  // whether a REDUCE of this block must be read again
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    const uint32_t within = choice.found()[first + i] >> 16;
    again |= within > ROOM;
    if (i == warp) n = within;
  }
  if (n <= ROOM)  // few are in the bin: no need for a histogram of the block
    Candidates<Key>(choice, first + warp, n).each([&](Key key, uint32_t) {
      if (key >> shift == (threshold & low) >> shift) all.add(key);
    });
  if (again) {
    Histogram histogram = Histogram::of(bins, choice, pass);
    histogram.clear();
    if (n > ROOM) {
      const uint32_t flags = eligible(e, part, choice);
#pragma unroll 1
      for (int k = 0; k < STEPS; ++k) {
        Key x[1][4];
        load_keys<T, RANDOM>(x, k, e, part, choice);
        uint32_t mine = flags >> 4 * k & 15;
#pragma unroll
        for (int c = 0; c < 4; ++c) mine &= ~(uint32_t(x[0][c] >> shift != threshold >> shift) << c);
        histogram.add(x, mine, choice.flip());
      }
      histogram.add_zeros(choice.flip());
    }
    histogram.flush(choice.state->bins[pass]);
  }
  if (is_last(choice.state->tickets + pass, choice.blocks)) find_bin(choice.state, pass, nullptr, choice.lowest);
}

// Reads a REDUCE again: the flags of a lane's elements above the threshold, and of those equal to it.
template <class T, bool RANDOM, class Key>
__device__ void compare(const ScoresEntry& e, const Part& part, const Choice<Key>& choice, Key threshold, uint32_t& above,
                        uint32_t& equal) {
  const uint32_t flags = eligible(e, part, choice);
  above = equal = 0;
#pragma unroll 1
  for (int k = 0; k < STEPS; ++k) {
    Key x[1][4];
    load_keys<T, RANDOM>(x, k, e, part, choice);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      above |= uint32_t(x[0][c] > threshold) << (4 * k + c);
      equal |= uint32_t(x[0][c] == threshold) << (4 * k + c);
    }
  }
  above &= flags, equal &= flags;
}

// Two counts of 16 bits as two of 32.
__device__ uint64_t apart(uint32_t counts) { return (counts & 0xffff) | uint64_t(counts >> 16) << 32; }

// With the threshold known, marks the candidates above it and counts those equal to it.
template <class T, bool RANDOM, class Key, int N>
__global__ void __launch_bounds__(THREADS, 4)
    mark_candidates(const __grid_constant__ ScoresTable<N> table, const Choice<Key> choice) {
  __shared__ uint32_t added[THREADS], sums;
  const ScoresEntry& e = table.find(blockIdx.x);
  const Part part(e);
  const Key threshold = choice.state->threshold;
  const uint32_t block = block_of(e);
  const int64_t warp = int64_t(block) * WARPS + threadIdx.x / WARP;
  const uint32_t found = choice.found()[warp], n = choice.state->exact ? 0 : found >> 16;
  uint32_t equals = 0;
  added[threadIdx.x] = 0;
  if (threadIdx.x == 0) sums = 0;
  __syncthreads();
  if (n <= ROOM) {
    const Key low = threshold & ((Key(1) << shift_of<Key>(0)) - 1);
    Candidates<Key>(choice, warp, n).each([&](Key key, uint32_t at) {
      if (key > low) atomicOr(added + threadIdx.x / WARP * WARP + at / 32, 1u << at % 32);
      equals += key == low;
    });
  } else {
    uint32_t above, equal;
    compare<T, RANDOM>(e, part, choice, threshold, above, equal);
    added[threadIdx.x] = word_of(above);  // includes the certain ones again, which is harmless
    equals = __popc(equal);
  }
  __syncthreads();
  uint32_t* const word = choice.marks + e.first_word + part.word();
  const uint32_t marks = part.has_word() && n ? *word | added[threadIdx.x] : 0;
  if (part.has_word() && n) *word = marks;
  const uint32_t sum = sum_warp(uint32_t(__popc(marks)) | equals << 16);
  if (part.lane == 0) {
    const uint32_t all = n ? sum : found;
    choice.found()[warp] = all;
    atomicAdd(&sums, all);
  }
  __syncthreads();
  if (threadIdx.x == 0) choice.block_found()[block] = sums;
  if (!is_last(choice.state->tickets + PASSES<Key>, choice.blocks)) return;

  constexpr uint32_t MINE = 8;
  uint64_t before_all = 0;
  for (uint32_t start = 0; start < choice.blocks; start += MINE * THREADS) {
    const uint32_t first = start + MINE * threadIdx.x;
    uint32_t each[MINE];
    uint64_t mine = 0, all;
#pragma unroll
    for (uint32_t i = 0; i < MINE; ++i) {
      each[i] = first + i < choice.blocks ? choice.block_found()[first + i] : 0;
      mine += apart(each[i]);
    }
    uint64_t before = before_all + sum_before_in_block(mine, all);
#pragma unroll
    for (uint32_t i = 0; i < MINE; ++i) {
      if (first + i < choice.blocks) choice.before()[first + i] = before;
      before += apart(each[i]);
    }
    before_all += all;
  }
}

// The last pass: ranks, and the first of those equal to the threshold.
template <class T, bool RANDOM, class Key, int N>
__global__ void __launch_bounds__(THREADS) mark_equal(const __grid_constant__ ScoresTable<N> table, const Choice<Key> choice) {
  const ScoresEntry& e = table.find(blockIdx.x);
  const Part part(e);
  if (part.elements <= 0) return;
  const uint32_t block = block_of(e), missing = choice.state->missing;
  const Key threshold = choice.state->threshold;
  const uint64_t before_block = choice.before()[block];
  uint32_t chosen = uint32_t(before_block), equals = uint32_t(before_block >> 32), mine = 0;
  for (int i = 0; i <= int(threadIdx.x / WARP); ++i) {
    chosen += mine & 0xffff, equals += mine >> 16;
    mine = choice.found()[int64_t(block) * WARPS + i];
  }
  mine >>= 16;
  const uint32_t taken = min(equals, missing), take = min(mine, missing - taken);
  if (part.lane == 0) choice.ranks[e.first_rank + part.reduce] = chosen + taken;
  if (!take) return;
  uint32_t* const marks = choice.marks + e.first_word + part.word();
  uint32_t word, above, equal;
  if (threshold == 0) {  // those not above it
    equal = eligible(e, part, choice);
    word = word_of(equal) & ~(part.has_word() ? *marks : 0);
  } else {
    compare<T, RANDOM>(e, part, choice, threshold, above, equal);
    word = word_of(equal);
  }
  const int count = __popc(word), room = int(take) - int(sum_before(uint32_t(count)));
  for (int surplus = count - max(room, 0); surplus > 0; --surplus) word &= ~(0x80000000u >> __clz(word));
  if (word) *marks |= word;
}

// Moves ones; both choices were made in the mask as it was. A rank changes by the number chosen before it.
__global__ void __launch_bounds__(THREADS)
    move_ones(uint32_t* const words, const uint32_t* const dropped, const uint32_t* const grown, const int64_t count,
              uint32_t* const ranks, const uint32_t* const dropped_before, const uint32_t* const grown_before,
              const int64_t reduces, const int64_t* const bad_tensor) {
  if (*bad_tensor >= 0) return;
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i < count) words[i] = (words[i] & ~dropped[i]) | grown[i];
  if (i < reduces) ranks[i] += grown_before[i] - dropped_before[i];
}

// --- on the host -----------------------------------------------------------------------------------------------------

struct Size {
  int64_t elements = 0, words = 0, reduces = 0, blocks = 0;

  explicit Size(const TensorList& list) {
    for (const Tensor& t : list.tensors) {
      const int64_t n = t.numel();
      elements += n, words += flatops::words(n), reduces += flatops::ranks(n), blocks += ceil_div(n, TILE);
    }
    if (elements > int64_t(UINT32_MAX))
      throw std::invalid_argument("flatops: more than 2^32 scores in one list: a mask counts no further");
  }
};

// The request.
struct Question {
  bool random, magnitudes, lowest, dead;
  const uint32_t* among;
  Noise noise;
  uint32_t place;
  Wanted wanted;
  const uint32_t* earlier_bad;
  int64_t* bad_tensor;
};

// The data.
struct Marks {
  uint32_t* words;
  uint32_t* ranks;
};

template <bool RANDOM, class Key>
const uint32_t* choose(const TensorList& list, const Question& q, const Marks& marks, const Gpu& gpu) {
  const int64_t blocks = Size(list).blocks;
  const Choice<Key> choice{.state = (State<Key>*)gpu.scratch(Choice<Key>::scratch(blocks)), .marks = marks.words, .ranks = marks.ranks, .among = q.among, .noise = q.noise, .blocks = uint32_t(blocks), .place = q.place, .dead = q.dead, .lowest = q.lowest, .magnitudes = q.magnitudes};
  check(cudaMemsetAsync(choice.state, 0, sizeof(State<Key>), (cudaStream_t)gpu.stream));

  // Random scores have no dtype.
  Work<ScoresEntry> work[std::size(DTYPES)];
  int64_t word = 0, rank = 0, tile = 0;
  for (size_t i = 0; i < list.tensors.size(); ++i) {
    const Tensor& t = list.tensors[i];
    const int64_t n = t.numel(), tiles = ceil_div(n, TILE);
    work[int(RANDOM ? DType::f32 : t.dtype)].add(
        {.scores = t.scores, .elements = n, .first_word = uint32_t(word), .first_rank = uint32_t(rank), .first_tile = uint32_t(tile), .tensor = uint32_t(i), .index = t.index, .aligned = are_aligned(t.dtype, {t.scores})},
        tiles);
    word += words(n), rank += ranks(n), tile += tiles;
  }
  const auto each_dtype = [&](const auto& f) {
    if constexpr (RANDOM) return f((float*)nullptr, work[int(DType::f32)]);
    else
      for (DType dtype : DTYPES)
        by_dtype(dtype, [&]<class T>(T* null) {
          if constexpr ((sizeof(T) == 8) == (sizeof(Key) == 8)) f(null, work[int(dtype)]);
        });
  };
  each_dtype([&]<class T>(T*, const Work<ScoresEntry>& w) {
    launch(w, gpu, [](auto n) { return count_all<T, RANDOM, Key, n.value>; }, choice, q.wanted, q.earlier_bad, q.bad_tensor);
  });
  each_dtype([&]<class T>(T*, const Work<ScoresEntry>& w) {
    launch(w, gpu, [](auto n) { return mark_sure<T, RANDOM, Key, n.value>; }, choice);
  });
  for (int pass = 2; pass < PASSES<Key>; ++pass)
    each_dtype([&]<class T>(T*, const Work<ScoresEntry>& w) {
      launch(w, gpu, [](auto n) { return count_within<T, RANDOM, Key, n.value>; }, choice, pass);
    });
  each_dtype([&]<class T>(T*, const Work<ScoresEntry>& w) {
    launch(w, gpu, [](auto n) { return mark_candidates<T, RANDOM, Key, n.value>; }, choice);
  });
  each_dtype([&]<class T>(T*, const Work<ScoresEntry>& w) {
    launch(w, gpu, [](auto n) { return mark_equal<T, RANDOM, Key, n.value>; }, choice);
  });
  return &choice.state->bad;
}

// Returns the address that tells a later choice whether this one found a bad score.
const uint32_t* choose(const TensorList& list, const Question& q, const Marks& marks, const Gpu& gpu) {
  if (q.random) return choose<true, uint32_t>(list, q, marks, gpu);
  bool wide = false, others = false;
  for (const Tensor& t : list.tensors)
    if (t.filters) (t.dtype == DType::f64 ? wide : others) = true;
  if (wide && others) throw std::invalid_argument("flatops: float64 scores among others: convert them to one dtype");
  return wide ? choose<false, uint64_t>(list, q, marks, gpu) : choose<false, uint32_t>(list, q, marks, gpu);
}

}  // namespace
}  // namespace flatops::cuda

namespace flatops {

template <> void topk_mask(TensorList& list, int64_t count, int64_t* bad, const Gpu& gpu) {
  using namespace cuda;
  if (!Size(list).elements) return check(cudaMemsetAsync(bad, 0xff, sizeof(*bad), (cudaStream_t)gpu.stream));
  const Question q{.wanted = {.count = uint32_t(count)}, .bad_tensor = bad};
  choose(list, q, {.words = list.tensors[0].bits, .ranks = list.tensors[0].ranks}, gpu);
}

template <>
void regrow_mask_(TensorList& drop, TensorList& grow, Random random, Noise noise, int64_t count, int64_t* bad, const Gpu& gpu) {
  using namespace cuda;
  const Size size(drop);
  if (!size.elements) return check(cudaMemsetAsync(bad, 0xff, sizeof(*bad), (cudaStream_t)gpu.stream));
  const auto room = [&](int64_t n) { return (uint32_t*)gpu.scratch(n * sizeof(uint32_t)); };
  const Marks mask{.words = drop.tensors[0].bits, .ranks = drop.tensors[0].ranks};
  const Marks dropped{.words = room(size.words), .ranks = room(size.reduces)};
  const Marks grown{.words = room(size.words), .ranks = room(size.reduces)};
  Question q{.random = random.drop, .magnitudes = true, .lowest = !random.drop, .among = mask.words, .noise = noise, .place = 0xfffffffe, .wanted = {.count = uint32_t(std::min(count, size.elements)), .elements = uint32_t(size.elements)}, .bad_tensor = bad};
  q.earlier_bad = choose(drop, q, dropped, gpu);
  q.random = random.grow, q.lowest = false, q.dead = true, q.place = 0xffffffff;
  choose(grow, q, grown, gpu);

  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(ceil_div(size.words, THREADS)));
  config.blockDim = dim3(THREADS);
  config.stream = (cudaStream_t)gpu.stream;
  check(cudaLaunchKernelEx(&config, move_ones, mask.words, dropped.words, grown.words, size.words, mask.ranks, dropped.ranks,
                           grown.ranks, size.reduces, bad));
}

}  // namespace flatops
