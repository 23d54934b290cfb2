// topk_mask and regrow_mask_: the elements with the k largest scores of a whole list, exactly k, ties to the first.
//
// A sample of the scores brackets the threshold. One pass over all scores marks those above the bracket and collects
// those inside it (about two per cent of a large list), among which the threshold is then found. If a bracket holds a
// single value, nothing is collected: its elements are counted, and a second pass marks the first of them. The sample
// affects the time, never the result: a bracket that misses the threshold is widened, up to everything.
#define FLATOPS_FILE "cpu/mask.cpp"
#ifndef FLATOPS_LEVEL
#include <cstdint>
#include <limits>
#include <memory>

#include "ops.h"

namespace flatops::cpu {

// Scores; the largest are marked.
struct Scores {
  enum Kind { value,
              magnitude,
              random } kind;
  bool lowest = false;                // the lowest first
  enum Among { all,
               live,
               dead } among = all;  // among all elements, or those whose bit is (not) set
  Noise noise = {};                   // random: Philox words ...
  uint32_t filter = 0;                // ... with this in the counter, larger than any filter

  DType dtype(const Tensor& t) const { return kind == random ? DType::f32 : t.dtype; }
  uint32_t eligible(const Tensor& t, int64_t word) const {
    return among == all ? ~0u : among == live ? t.bits[word]
                                              : ~t.bits[word];
  }
};

// Scores above `high` are marked; those from `low` to `high` are collected, or counted if low == high.
struct Bracket {
  double low, high;
  bool one_value() const { return low == high; }
};

// A block's scores above and inside the bracket: their number, and those inside.
struct Found {
  std::unique_ptr<char[]> memory;
  int64_t size = 0, room = 0;
  int64_t above = 0, within = 0;
  bool bad = false;  // a NaN, or a negative value

  template <class X> X* scores() const { return (X*)memory.get(); }
  template <class X> uint32_t* offsets() const { return (uint32_t*)(scores<X>() + room); }  // in the block
  template <class X> void make_room(int64_t n) {
    if (size + n <= room) return;
    Found larger;
    larger.room = 2 * room + n;
    larger.memory.reset(new char[larger.room * (sizeof(X) + sizeof(uint32_t))]);
    std::copy_n(scores<X>(), size, larger.scores<X>());
    std::copy_n(offsets<X>(), size, larger.offsets<X>());
    memory = std::move(larger.memory), room = larger.room;
  }
};

}  // namespace flatops::cpu
#endif
#include "cpu/each_level.h"

#ifdef FLATOPS_LEVEL

// 32 scores as bits: above the bracket; inside or above; valid (neither NaN nor below `least`).
struct Bits { uint32_t above, from_low, good; };

FLATOPS_INLINE Bits compare(const float* x, float low, float high, float least) {
  Bits bits{};
  FLATOPS_UNROLL for (int i = 0; i < 32; i += W) {
    const F32 v = load<F32>(x + i);
    bits.above |= above(v, F32{} + high) << i;
    bits.from_low |= from(v, F32{} + low) << i;
    bits.good |= from(v, F32{} + least) << i;
  }
  return bits;
}
FLATOPS_INLINE Bits compare(const double* x, double low, double high, double least) {
  Bits bits{};
  for (int i = 0; i < 32; ++i) {
    bits.above |= uint32_t(x[i] > high) << i;
    bits.from_low |= uint32_t(x[i] >= low) << i;
    bits.good |= uint32_t(x[i] >= least) << i;
  }
  return bits;
}

// The positions of the set bits of a tile's words, counted from `base`. Of each 64, four are written unconditionally,
// which is faster than a test; returns the true number.
FLATOPS_INLINE int64_t places(const uint32_t (&words)[REDUCE / 32], uint32_t base, uint32_t* out) {
  const uint32_t* const begin = out;
  for (int w = 0; w < REDUCE / 32; w += 2) {
    uint64_t bits = words[w] | uint64_t(words[w + 1]) << 32;
    const int n = __builtin_popcountll(bits);
    FLATOPS_UNROLL for (int k = 0; k < 4; ++k, bits &= bits - 1)
        out[k] = base + 32 * w + __builtin_ctzll(bits | uint64_t(1) << 63);
    for (int k = 4; k < n; ++k, bits &= bits - 1) out[k] = base + 32 * w + __builtin_ctzll(bits);
    out += n;
  }
  return out - begin;
}

// The upper 24 bits of the words of offsets start to start + n, as floats.
FLATOPS_INLINE void random_scores(const PhiloxKeys& keys, const PhiloxFilter& filter, int64_t start, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i += IN_FLIGHT * NORMALS) {
    Philox<IN_FLIGHT> p;
    p.start(keys, filter, BLOCK_ORDER + uint64_t((start + i) / 4), D);
    p.rounds(keys, 2, 10);
    Words<IN_FLIGHT> words;
    words.take(p);
    FLATOPS_UNROLL for (int k = 0; k < IN_FLIGHT; ++k) {
      F32 lo, hi;
      interleave(as_float(words.radius[k]), as_float(words.angle[k]), lo, hi);
      store(x + i + k * NORMALS, to_float((bits(lo) >> 8) & 0xffffff));
      store(x + i + k * NORMALS + W, to_float((bits(hi) >> 8) & 0xffffff));
    }
  }
}

// The dtype of scores of a T: float64 for float64, else float32.
template <class T> using ScoreOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A tile of scores, with room for what the last step of a loop writes beyond it.
template <class X> struct alignas(64) ScoreTile { X x[REDUCE + IN_FLIGHT * NORMALS]; };

// The scores of n elements from `start` on, up to a REDUCE of them.
template <class T, class X = ScoreOf<T>>
FLATOPS_INLINE const X* scores_of(const Tensor& t, const Scores& s, const Draws* draws, int64_t start, int64_t n, ScoreTile<X>& room) {
  const X* x = room.x;
  Tile tile;
  if (!draws) x = open((const T*)t.scores + start, n, tile);
  else if constexpr (std::is_same_v<T, float>) random_scores(draws->keys, draws->filter(s.filter, t.index), start, n, room.x);
  if (!draws && s.kind == Scores::value && !s.lowest && !std::is_same_v<T, Bf16> && !std::is_same_v<T, F16>) return x;
  for (int64_t i = 0; i < n; ++i) {
    const X a = s.kind == Scores::magnitude ? std::abs(x[i]) : x[i];
    room.x[i] = s.lowest ? -a : a;
  }
  return room.x;
}

static std::unique_ptr<Draws> draws_of(const Scores& s) {
  return s.kind == Scores::random ? std::make_unique<Draws>(Draws::make(s.noise)) : nullptr;
}

template <class T, class X = ScoreOf<T>>
static void mark_of(const Tensor& t, const Block& b, uint32_t* marks, const Scores& s, const Bracket& bracket, Found& found) {
  const X low = X(bracket.low), high = X(bracket.high), least = s.kind == Scores::value ? X(0) : -std::numeric_limits<X>::infinity();
  const auto draws = draws_of(s);
  ScoreTile<X> room;
  alignas(64) X tail[32] = {};
  uint32_t good = ~0u;
  for (int64_t i = b.start; i < b.start + b.length; i += REDUCE) {
    const int64_t n = std::min(REDUCE, b.start + b.length - i);
    for (int64_t j = 0; !draws && j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch((const T*)t.scores + i + REDUCE + j);
    const X* x = scores_of<T>(t, s, draws.get(), i, n, room);
    if (!bracket.one_value()) found.make_room<X>(n + 4);
    uint32_t candidates[REDUCE / 32] = {};
    for (int64_t j = 0; j < n; j += 32) {
      const int64_t word = (i + j) / 32;
      uint32_t valid = s.eligible(t, word);
      const X* p = x + j;
      if (n - j < 32) {
        std::copy_n(p, n - j, tail);
        p = tail;
        valid &= (1u << (n - j)) - 1;
      }
      const Bits bits = compare(p, low, high, least);
      const uint32_t above = bits.above & valid;
      const uint32_t within = bits.from_low & ~bits.above & valid;
      candidates[j / 32] = within;
      good &= bits.good | ~valid;
      marks[word] = above;
      found.above += __builtin_popcount(above);
      found.within += __builtin_popcount(within);
    }
    if (bracket.one_value()) continue;
    uint32_t* const offsets = found.offsets<X>() + found.size;
    const uint32_t base = uint32_t(i - b.start);
    const int64_t fresh = places(candidates, base, offsets);
    for (int64_t k = 0; k < fresh; ++k) found.scores<X>()[found.size + k] = x[offsets[k] - base];
    found.size += fresh;
  }
  found.bad = good != ~0u;
}

static void mark(const Tensor& t, const Block& b, uint32_t* marks, const Scores& s, const Bracket& bracket, Found& found) {
  FLATOPS_BY_DTYPE(s.dtype(t), mark_of, t, b, marks, s, bracket, found)
}

// Marks the first `count` elements of a block whose score is `score`.
template <class T, class X = ScoreOf<T>>
static void mark_equal_of(const Tensor& t, const Block& b, uint32_t* marks, const Scores& s, double score, int64_t count) {
  const auto draws = draws_of(s);
  ScoreTile<X> room;
  for (int64_t i = b.start; i < b.start + b.length && count; i += REDUCE) {
    const int64_t n = std::min(REDUCE, b.start + b.length - i);
    const X* x = scores_of<T>(t, s, draws.get(), i, n, room);
    for (int64_t j = 0; j < n && count; j += 32) {
      uint32_t equal = 0;
      for (int64_t k = 0; k < std::min<int64_t>(32, n - j); ++k) equal |= uint32_t(x[j + k] == X(score)) << k;
      equal &= s.eligible(t, (i + j) / 32);
      for (int64_t surplus = __builtin_popcount(equal) - count; surplus > 0; --surplus)
        equal &= ~(0x80000000u >> __builtin_clz(equal));
      marks[(i + j) / 32] |= equal;
      count -= __builtin_popcount(equal);
    }
  }
}

static void mark_equal(const Tensor& t, const Block& b, uint32_t* marks, const Scores& s, double score, int64_t count) {
  FLATOPS_BY_DTYPE(s.dtype(t), mark_equal_of, t, b, marks, s, score, count)
}

// Writes the ranks of a mask, and returns how many ones it has.
static int64_t rank(const TensorList& list) {
  int64_t before = 0;
  for (const Tensor& t : list.tensors)
    for (int64_t w = 0; w < words(t.numel()); ++w) {
      if (w % 32 == 0) t.ranks[w / 32] = uint32_t(before);
      before += __builtin_popcount(t.bits[w]);
    }
  return before;
}

#else

#include "cpu/element.h"

namespace flatops::cpu {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int64_t LARGEST_SAMPLE = 32768, SMALLEST_SAMPLE = 256;  // scores
constexpr double UNIFORM = 1 << 24;  // random scores are the integers below it

struct Selection {
  TensorList& list;         // cut as a whole
  const Scores& scores;
  int64_t count, eligible;  // elements to mark, and to choose from
  uint32_t* marks;          // the words of the whole list
  const Parallel& parallel;
  std::vector<int64_t> first_word;  // of each tensor

  Selection(TensorList& list, const Scores& scores, int64_t count, int64_t eligible, uint32_t* marks, const Parallel& parallel)
      : list(list), scores(scores), count(count), eligible(eligible), marks(marks), parallel(parallel) {
    int64_t at = 0;
    for (const Tensor& t : list.tensors) first_word.push_back(at), at += words(t.numel());
  }

  uint32_t* marks_of(const Block& b) const { return marks + first_word[b.tensor]; }
  bool f64() const { return !list.tensors.empty() && scores.dtype(list.tensors[0]) == DType::f64; }  // all tensors, or none
  double next(double x, double towards) const {
    return f64() ? std::nextafter(x, towards) : double(std::nextafter(float(x), float(towards)));
  }

  // Scores at equal distances over the list. Of n elements a sample of s leaves up to 2.5 n / sqrt(s) candidates. A
  // candidate costs as much as a sampled score, so the sum is least for s^(3/2) = 1.25 n.
  std::vector<double> sample() const {
    int64_t total = 0, begin = 0;
    for (const Tensor& t : list.tensors) total += t.numel();
    const int64_t size = std::min(LARGEST_SAMPLE, int64_t(std::pow(1.25 * double(total), 2.0 / 3)));
    std::vector<double> out;
    out.reserve(size);
    size_t tensor = 0;
    for (int64_t k = 0; k < size; ++k) {
      const int64_t at = int64_t((double(k) + 0.5) * double(total) / double(size));
      while (at - begin >= list.tensors[tensor].numel()) begin += list.tensors[tensor++].numel();
      const Tensor& t = list.tensors[tensor];
      const int64_t i = at - begin;
      if (!(scores.eligible(t, i / 32) >> (i % 32) & 1)) continue;
      const double x = element(t.scores, t.dtype, i), score = scores.kind == Scores::magnitude ? std::abs(x) : x;
      if (score == score) out.push_back(scores.lowest ? -score : score);
    }
    return out;
  }

  // The first bad tensor, or -1.
  int64_t run() {
    if (count == 0) return attempt({INF, INF}), bad;
    if (count == eligible) return attempt({-INF, -INF}), bad;
    const double q = double(count) / double(eligible);
    if (scores.kind == Scores::random) {
      const double middle = UNIFORM * (1 - q), margin = UNIFORM * 5 * std::sqrt(q * (1 - q) / double(eligible)) + 2;
      if (attempt({std::floor(middle - margin), std::ceil(middle + margin)})) return bad;
      return attempt({-INF, INF}), bad;
    }
    std::vector<double> seen = sample();
    const int64_t n = int64_t(seen.size()), rank = int64_t(q * double(n));
    const auto at = [&](int64_t i, double otherwise) {
      if (i < 0 || i >= n) return otherwise;
      std::nth_element(seen.begin(), seen.begin() + i, seen.end(), std::greater<>());
      return seen[i];
    };
    for (double widen = 1; n >= SMALLEST_SAMPLE && widen < 100; widen *= 8) {
      const int64_t margin = int64_t(widen * (2.5 * std::sqrt(double(n) * q * (1 - q)) + 4));
      const Bracket ends{at(rank + margin, -INF), at(rank - margin, INF)};
      // A value that many scores share is excluded from a bracket that it ends, and gets its own if needed.
      const auto shared = [&](double x) { return std::count(seen.begin(), seen.end(), x) > margin; };
      Bracket b = ends;
      if (!ends.one_value() && shared(ends.low)) b.low = next(b.low, INF);
      if (!ends.one_value() && shared(ends.high)) b.high = next(b.high, -INF);
      if (b.low > b.high) b = {ends.low, ends.low};
      if (attempt(b)) return bad;
      const double missed = surplus ? ends.high : ends.low;
      if ((surplus ? b.high : b.low) != missed && attempt({missed, missed})) return bad;
    }
    return attempt({-INF, INF}), bad;
  }

  int64_t bad = -1;
  bool surplus = false;  // a bracket missed because too many scores are above it

  // Marks with this bracket. False if the threshold is not in it.
  bool attempt(const Bracket& bracket) {
    const auto mark = FLATOPS_BEST(mark);
    const auto& blocks = list.blocks;
    std::vector<Found> found(blocks.size());
    parallel(int64_t(blocks.size()), [&](int64_t i) {
      mark(list.tensors[blocks[i].tensor], blocks[i], marks_of(blocks[i]), scores, bracket, found[i]);
    });
    int64_t above = 0, within = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      above += found[i].above, within += found[i].within;
      if (found[i].bad && bad < 0) bad = blocks[i].tensor;
    }
    if (bad >= 0) return true;
    const int64_t missing = count - above;
    surplus = missing < 0;
    if (missing < 0 || missing > within) return false;
    if (bracket.one_value()) mark_first(found, bracket.low, missing);
    else if (f64()) mark_best<double>(found, bracket, missing);
    else mark_best<float>(found, bracket, missing);
    return true;
  }

  void mark_first(const std::vector<Found>& found, double score, int64_t missing) {
    const auto mark_equal = FLATOPS_BEST(mark_equal);
    std::vector<int64_t> share(found.size());
    for (size_t i = 0; i < found.size(); ++i) missing -= share[i] = std::min(missing, found[i].within);
    parallel(int64_t(found.size()), [&](int64_t i) {
      const Block& b = list.blocks[i];
      if (share[i]) mark_equal(list.tensors[b.tensor], b, marks_of(b), scores, score, share[i]);
    });
  }

  template <class X> void mark_best(const std::vector<Found>& found, const Bracket& bracket, int64_t missing) {
    // A histogram leaves few candidates to sort. An infinite bracket has few to begin with, or everything.
    constexpr int BINS = 4096;
    // There is also none if the values are so close that its scale overflows.
    const X low = X(bracket.low), scale = X((BINS - 1) / (bracket.high - bracket.low));
    const bool finite = std::isfinite(low) && std::isfinite(scale) && scale > 0;
    const auto bin = [&](X score) { return finite ? std::min(int((score - low) * scale), BINS - 1) : 0; };
    std::vector<int64_t> bins(BINS);
    for (const Found& f : found)
      for (int64_t k = 0; k < f.size; ++k) ++bins[bin(f.scores<X>()[k])];
    int last = BINS - 1;
    while (last > 0 && bins[last] <= missing) missing -= bins[last--];
    struct Rest {
      X score;
      size_t block;
      uint32_t offset;
    };
    std::vector<Rest> rest;
    for (size_t i = 0; i < found.size(); ++i) {
      uint32_t* const words = marks_of(list.blocks[i]) + list.blocks[i].start / 32;
      const X* const x = found[i].scores<X>();
      const uint32_t* const offset = found[i].offsets<X>();
      for (int64_t k = 0; k < found[i].size; ++k) {
        const int at = bin(x[k]);
        words[offset[k] / 32] |= uint32_t(at > last) << (offset[k] % 32);
        if (at == last) rest.push_back({x[k], i, offset[k]});
      }
    }
    std::nth_element(rest.begin(), rest.begin() + missing, rest.end(), [](const Rest& a, const Rest& b) {
      return a.score != b.score ? a.score > b.score : a.block != b.block ? a.block < b.block
                                                                         : a.offset < b.offset;
    });
    for (int64_t k = 0; k < missing; ++k) {
      const Block& b = list.blocks[rest[k].block];
      marks_of(b)[(b.start + rest[k].offset) / 32] |= 1u << (rest[k].offset % 32);
    }
  }
};

}  // namespace
}  // namespace flatops::cpu

namespace flatops {

template <> void topk_mask(TensorList& list, int64_t count, int64_t* bad, const Parallel& parallel) {
  list.cut(/*whole=*/true);
  int64_t elements = 0;
  for (const Tensor& t : list.tensors) elements += t.numel();
  const cpu::Scores scores{.kind = cpu::Scores::value};
  *bad = list.tensors.empty() ? -1 : cpu::Selection(list, scores, count, elements, list.tensors[0].bits, parallel).run();
  FLATOPS_BEST(rank)(list);
}

template <>
void regrow_mask_(TensorList& drop, TensorList& grow, Random random, Noise noise, int64_t count, int64_t* bad, const Parallel& parallel) {
  drop.cut(/*whole=*/true);
  grow.cut(/*whole=*/true);
  int64_t elements = 0, size = 0;
  for (const Tensor& t : drop.tensors) elements += t.numel(), size += words(t.numel());
  const int64_t live = FLATOPS_BEST(rank)(drop);
  count = std::min({count, live, elements - live});
  std::vector<uint32_t> dropped(size), grown(size);
  using cpu::Scores;
  const Scores drops{.kind = random.drop ? Scores::random : Scores::magnitude, .lowest = !random.drop, .among = Scores::live, .noise = noise, .filter = 0xfffffffe};
  const Scores grows{.kind = random.grow ? Scores::random : Scores::magnitude, .among = Scores::dead, .noise = noise, .filter = 0xffffffff};
  *bad = cpu::Selection(drop, drops, count, live, dropped.data(), parallel).run();
  const int64_t bad_grow = cpu::Selection(grow, grows, count, elements - live, grown.data(), parallel).run();
  if (*bad < 0) *bad = bad_grow;
  if (*bad >= 0) return;
  uint32_t* const bits = drop.tensors[0].bits;
  for (int64_t w = 0; w < size; ++w) bits[w] = (bits[w] & ~dropped[w]) | grown[w];
  FLATOPS_BEST(rank)(drop);
}

}  // namespace flatops
#endif
