// Sums, norms and gradients of bags. One thread owns four neighbouring columns of one row or bag, so that a warp moves whole
// rows, 16 bytes a lane; what one thread adds up, it adds in the order of the lookups. No atomics: results are deterministic.
#include "cuda/bags.h"

#include <cmath>

#include "common/exact_sum.h"
#include "cuda/divider.cuh"
#include "cuda/launch.cuh"
#include "cuda/quad.cuh"

namespace lazydp::cuda {
namespace {

constexpr double kDoubleEpsilon = 0x1p-52;
constexpr int kInFlight = 4;  // loads of rows under way before the first is used

// One row of a sum, and its weight.
template <class Weight>
struct Term {
  Weight weight;
  Quad quad;
};

template <class Weight>
constexpr Term<Weight> kNothing = {0, {{0.0f, 0.0f, 0.0f, 0.0f}}};

// A sum in float32.
struct FloatSum {
  using Weight = float;

  Quad quad = same(0.0f);

  LAZYDP_DEVICE void add(const Term<float>& term) { add_product(quad, term.weight, term.quad); }
};

// sum over n in [0, count) of term_at(n), in that order, several loads in flight.
template <class Sum, class TermAt>
LAZYDP_DEVICE Sum sum_of(Sum sum, int64_t count, const TermAt& term_at) {
  using SomeTerm = decltype(term_at(0));
  int64_t n = 0;
  for (; n + kInFlight <= count; n += kInFlight) {
    SomeTerm terms[kInFlight];
    LAZYDP_UNROLL
    for (int j = 0; j < kInFlight; ++j) terms[j] = term_at(n + j);
    LAZYDP_UNROLL
    for (int j = 0; j < kInFlight; ++j) sum.add(terms[j]);
  }
  for (; n < count; ++n) sum.add(term_at(n));
  return sum;
}

template <bool kVector>
struct SumBags {
  BagSum job;
  Divider quads_per_row;
  bool but_single;
  int64_t count;

  LAZYDP_DEVICE void operator()(int64_t i) const {
    const int64_t bag = quads_per_row.quotient(i);
    const int64_t column = quads_per_row.remainder(i, bag) * kQuad;
    const int64_t begin = job.offsets[bag];
    const int64_t size = job.offsets[bag + 1] - begin;
    if (but_single && size == 1) return;
    if (size < 0) LAZYDP_REFUSE("offsets: expected none below the one before");
    const int width = quad_width(column, job.columns);
    bool outside = false;
    const FloatSum sum = sum_of(FloatSum{}, size, [&](int64_t n) -> Term<float> {
      const int64_t row = job.indices[begin + n];
      if (row < 0 || row >= job.num_rows) {
        outside = true;
        return kNothing<float>;
      }
      const float weight = job.per_lookup ? job.per_lookup[begin + n] : 1.0f;
      return {weight, load_quad<kVector>(job.weight + row * job.columns + column, width)};
    });
    if (outside) LAZYDP_REFUSE("indices: expected 0 <= index < rows of weight");
    store_quad<kVector>(job.out + bag * job.columns + column, sum.quad, width);
  }
};

cudaError_t launch(const BagSum& job, bool but_single, cudaStream_t stream) {
  const int64_t quads = quads_of(job.columns);
  const Divider divider(quads);
  if (rows_are_aligned(job.weight, job.columns) && rows_are_aligned(job.out, job.columns))
    return each(SumBags<true>{job, divider, but_single, job.bags * quads}, stream);
  return each(SumBags<false>{job, divider, but_single, job.bags * quads}, stream);
}

// The gradient of example i with respect to row r is the sum over features f of c[f, r] e_f, with c[f, r] the weight of r
// in bag (f, i). Its squared norm over all rows is the sum over pairs of features of
//
//     ( sum over rows r of c[f, r] c[g, r] )  <e_f, e_g>
//
// where the first factor is the sum of w_j w_k over lookups j of f and k of g that read the same row: no sorting, no
// room for a row's sum. A warp takes one pair of one example.
//
// Terms may cancel. So to the sum is added what float64 may have rounded away of it, and what is left is at least kCancelling
// times the largest term: a norm is never below that of what is really summed (cpu/bags.h says the same).
template <bool kVector>
struct PairNorms {
  struct Thread {};
  struct Shared {
    double weight[kLanes];
    double dot[kLanes];
    int matches[kLanes];
  };

  BagSquaredNorms job;
  Divider examples;
  int64_t count;

  struct Pair {
    int64_t f;
    int64_t g;
    int64_t example;
  };

  LAZYDP_DEVICE Pair pair_of(int64_t tile) const {
    int64_t pair = examples.quotient(tile);
    const int64_t example = examples.remainder(tile, pair);
    int64_t f = 0;
    for (; pair >= job.features - f; ++f) pair -= job.features - f;
    return {f, f + pair, example};
  }

  LAZYDP_DEVICE void first(int64_t tile, int lane, Thread&, Shared& shared) const {
    const Pair pair = pair_of(tile);
    count_matches(pair, lane, shared);
    shared.dot[lane] = dot(pair, lane);
  }

  LAZYDP_DEVICE void second(int64_t tile, int lane, const Thread&, const Shared& shared) const {
    if (lane != 0) return;
    double weight = 0.0;
    double dot = 0.0;
    int matches = 0;
    for (int other = 0; other < kLanes; ++other) {
      weight += shared.weight[other];
      dot += shared.dot[other];
      matches += shared.matches[other];
    }
    const Pair pair = pair_of(tile);
    // A pair without a common row counts nothing, even where its gradients are not finite.
    job.workspace[tile] = matches == 0 ? 0.0 : (pair.f == pair.g ? 1.0 : 2.0) * weight * dot;
  }

 private:
  LAZYDP_DEVICE void count_matches(const Pair& pair, int lane, Shared& shared) const {
    const int64_t* of_f = job.offsets + pair.f * job.examples + pair.example;
    const int64_t* of_g = job.offsets + pair.g * job.examples + pair.example;
    double weight = 0.0;
    int matches = 0;
    for (int64_t j = of_f[0]; j < of_f[1]; ++j) {
      for (int64_t k = of_g[0] + lane; k < of_g[1]; k += kLanes) {
        if (job.indices[j] != job.indices[k]) continue;
        weight += job.per_lookup ? static_cast<double>(job.per_lookup[j]) * static_cast<double>(job.per_lookup[k]) : 1.0;
        ++matches;
      }
    }
    shared.weight[lane] = weight;
    shared.matches[lane] = matches;
  }

  LAZYDP_DEVICE double dot(const Pair& pair, int lane) const {
    const float* e_f = job.grad + (pair.f * job.examples + pair.example) * job.columns;
    const float* e_g = job.grad + (pair.g * job.examples + pair.example) * job.columns;
    double sum = 0.0;
    for (int64_t column = int64_t{lane} * kQuad; column < job.columns; column += kLanes * kQuad) {
      const int width = quad_width(column, job.columns);
      const Quad a = load_quad<kVector>(e_f + column, width);
      const Quad b = load_quad<kVector>(e_g + column, width);
      LAZYDP_UNROLL
      for (int j = 0; j < kQuad; ++j) sum += static_cast<double>(a.v[j]) * static_cast<double>(b.v[j]);
    }
    return sum;
  }
};

int64_t pairs_of(int64_t features) { return features * (features + 1) / 2; }

// For each bag what its terms add up to in absolute value, times the norm of its gradient, and the largest term. A warp takes one bag.
struct TermSizes {
  struct Thread {};
  struct Shared {
    double absolute[kLanes];
    double heaviest[kLanes];
    double squares[kLanes];
    double largest[kLanes];
  };

  BagSquaredNorms job;
  double* sizes;  // [bags, 2]
  int64_t count;

  LAZYDP_DEVICE static double absolute_of(const Shared& shared) {
    double absolute = 0.0;
    double squares = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
      absolute += shared.absolute[lane];
      squares += shared.squares[lane];
    }
    return absolute * std::sqrt(squares);
  }

  LAZYDP_DEVICE static double largest_of(const Shared& shared) {
    double heaviest = 0.0;
    double largest = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
      heaviest = shared.heaviest[lane] > heaviest ? shared.heaviest[lane] : heaviest;
      largest = shared.largest[lane] > largest ? shared.largest[lane] : largest;
    }
    return heaviest * largest;
  }

  LAZYDP_DEVICE void first(int64_t bag, int lane, Thread&, Shared& shared) const {
    double absolute = 0.0;
    double heaviest = 0.0;
    for (int64_t j = job.offsets[bag] + lane; j < job.offsets[bag + 1]; j += kLanes) {
      const double weight = job.per_lookup ? std::fabs(static_cast<double>(job.per_lookup[j])) : 1.0;
      absolute += weight;
      heaviest = weight > heaviest ? weight : heaviest;
    }
    shared.absolute[lane] = absolute;
    shared.heaviest[lane] = heaviest;
    double squares = 0.0;
    double largest = 0.0;
    for (int64_t column = lane; column < job.columns; column += kLanes) {
      const double value = std::fabs(static_cast<double>(job.grad[bag * job.columns + column]));
      squares += value * value;
      largest = value > largest ? value : largest;
    }
    shared.squares[lane] = squares;
    shared.largest[lane] = largest;
  }

  LAZYDP_DEVICE void second(int64_t bag, int lane, const Thread&, const Shared& shared) const {
    if (lane > 1) return;
    // Empty bags have no terms, whatever their gradient is, finite or not.
    const bool empty = job.offsets[bag] == job.offsets[bag + 1];
    sizes[2 * bag + lane] = empty ? 0.0 : lane == 0 ? absolute_of(shared) : largest_of(shared);
  }
};

struct SumPairs {
  BagSquaredNorms job;
  int64_t pairs;
  int64_t count;

  LAZYDP_DEVICE void operator()(int64_t example) const {
    double norm = 0.0;
    for (int64_t pair = 0; pair < pairs; ++pair) norm += job.workspace[pair * job.examples + example];
    double absolute = 0.0;
    double largest = 0.0;
    int64_t terms = job.columns + pairs;
    for (int64_t f = 0; f < job.features; ++f) {
      const int64_t bag = f * job.examples + example;
      const double* of_bag = job.workspace + pairs * job.examples + 2 * bag;
      absolute += of_bag[0];
      largest = of_bag[1] > largest ? of_bag[1] : largest;
      terms += job.offsets[bag + 1] - job.offsets[bag];
    }
    norm = (norm < 0.0 ? 0.0 : norm) + static_cast<double>(terms) * kDoubleEpsilon * absolute * absolute;
    const double least = kCancelling * largest;
    const double found = norm < least * least ? least * least : norm;  // NaN stays
    job.out[example] = job.add ? job.out[example] + found : found;
  }
};

// A row that many lookups read (the common values of a small table) would keep one warp busy while the others idle. Rows
// of more than kChunk lookups are therefore added up in two rounds: first the part of the row that lies in each aligned
// chunk of kChunk sorted lookups, then the parts, in order. A chunk meets at most two such rows, the one that holds its
// first lookup (slot 2 c) and one that begins after it (slot 2 c + 1).
constexpr int64_t kChunk = 32;

int64_t slots_of(int64_t lookups) { return (lookups + kChunk - 1) / kChunk * 2; }

// How the gradients of a row are added up: in float32 ...
struct InFloat : FloatSum {
  LAZYDP_DEVICE explicit InFloat(const ScatterAdd&) {}

  LAZYDP_DEVICE void add(const Term<float>& term) { FloatSum::add(term); }
  LAZYDP_DEVICE void add_part(const float* from) { add_product(quad, 1.0f, load_quad<true>(from, kQuad)); }
  LAZYDP_DEVICE void store(float* to) const { store_quad<true>(to, quad, kQuad); }
  LAZYDP_DEVICE void add_to(const ScatterAdd& job, Quad& row) const { add_product(row, static_cast<float>(job.alpha), quad); }
};

// ... or exactly (common/exact_sum.h), in steps of job.grid.
struct InGrids {
  using Weight = double;

  double shift;
  ExactSum sums[kQuad];

  LAZYDP_DEVICE explicit InGrids(const ScatterAdd& job) : shift(kShift * job.grid) {}

  LAZYDP_DEVICE void add(const Term<double>& term) {
    LAZYDP_UNROLL
    for (int j = 0; j < kQuad; ++j) sums[j].add(term.weight, term.quad.v[j], shift);
  }
  LAZYDP_DEVICE void add_part(const float* from) {
    const auto* parts = reinterpret_cast<const uint64_t*>(from);
    LAZYDP_UNROLL
    for (int j = 0; j < kQuad; ++j) sums[j].sum += parts[j];
  }
  LAZYDP_DEVICE void store(float* to) const {
    auto* parts = reinterpret_cast<uint64_t*>(to);
    LAZYDP_UNROLL
    for (int j = 0; j < kQuad; ++j) parts[j] = sums[j].sum;
  }
  LAZYDP_DEVICE void add_to(const ScatterAdd& job, Quad& row) const {
    const double scale = job.alpha * job.grid;
    LAZYDP_UNROLL
    for (int j = 0; j < kQuad; ++j) row.v[j] = static_cast<float>(static_cast<double>(row.v[j]) + sums[j].in_grids() * scale);
  }
};

// Floats of workspace for the part of a row that one quad of a slot holds: four integers of 64 bits.
constexpr int64_t kPart = 2 * kQuad;

template <bool kVector, class Sum>
struct Lookups {
  ScatterAdd job;

  LAZYDP_DEVICE Sum sum(int64_t begin, int64_t end, int64_t column, int width) const {
    using Weight = typename Sum::Weight;
    bool order_outside = false;
    bool bag_outside = false;
    const Sum total = sum_of(Sum(job), end - begin, [&](int64_t n) -> Term<Weight> {
      const int64_t lookup = job.order[begin + n];
      order_outside |= lookup < 0 || lookup >= job.lookups;
      if (order_outside) return kNothing<Weight>;
      const int64_t bag = job.bag[lookup];
      bag_outside |= bag < 0 || bag >= job.bags;
      if (bag_outside) return kNothing<Weight>;
      const Weight scale = job.scale[bag];
      const Weight weight = job.per_lookup ? scale * static_cast<Weight>(job.per_lookup[lookup]) : scale;
      return {weight, load_quad<kVector>(job.grad + bag * job.columns + column, width)};
    });
    if (order_outside) LAZYDP_REFUSE("order: expected 0 <= position < lookups");
    if (bag_outside) LAZYDP_REFUSE("bag_of_lookup: expected 0 <= bag < bags of grad");
    return total;
  }
};

LAZYDP_DEVICE int64_t group_of(const ScatterAdd& job, int64_t lookup) {
  int64_t low = 0;
  int64_t high = job.groups;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (job.starts[middle] <= lookup ? low : high) = middle;
  }
  return low;
}

template <bool kVector, class Sum>
struct PartialSums {
  ScatterAdd job;
  Divider quads_per_row;
  int64_t quads;
  int64_t count;

  LAZYDP_DEVICE void operator()(int64_t i) const {
    const int64_t slot = quads_per_row.quotient(i);
    const int64_t quad = quads_per_row.remainder(i, slot);
    const int64_t chunk_begin = slot / 2 * kChunk;
    const int64_t chunk_end = chunk_begin + kChunk < job.lookups ? chunk_begin + kChunk : job.lookups;
    const bool begins_inside = slot % 2 == 1;
    const int64_t group = group_of(job, begins_inside ? chunk_end - 1 : chunk_begin);
    const int64_t begin = job.starts[group];
    const int64_t end = job.starts[group + 1];
    if (end - begin <= kChunk || (begins_inside && begin <= chunk_begin)) return;
    const int64_t column = quad * kQuad;
    const Sum sum = Lookups<kVector, Sum>{job}.sum(begin > chunk_begin ? begin : chunk_begin, end < chunk_end ? end : chunk_end,
                                                   column, quad_width(column, job.columns));
    sum.store(job.workspace + i * kPart);
  }
};

template <bool kVector, class Sum>
struct AddRows {
  ScatterAdd job;
  Divider quads_per_row;
  int64_t quads;
  int64_t count;

  LAZYDP_DEVICE void operator()(int64_t i) const {
    const int64_t group = quads_per_row.quotient(i);
    const int64_t quad = quads_per_row.remainder(i, group);
    const int64_t row = job.rows[group];
    if (row == kNoRow) return;
    if (row < 0 || row >= job.num_rows) LAZYDP_REFUSE("rows: expected 0 <= row < rows of weight");
    const int64_t begin = job.starts[group];
    const int64_t end = job.starts[group + 1];
    if (begin < 0 || end < begin || end > job.lookups) LAZYDP_REFUSE("starts: expected ascending positions of lookups");
    const int64_t column = quad * kQuad;
    const int width = quad_width(column, job.columns);
    float* const to = job.weight + row * job.columns + column;
    Quad value = load_quad<kVector>(to, width);
    if (end - begin == 1 && is_plain(begin)) {
      Lookups<kVector, InFloat>{job}.sum(begin, end, column, width).add_to(job, value);
      store_quad<kVector>(to, value, width);
      return;
    }
    const Sum sum =
        end - begin > kChunk ? sum_of_parts(begin, end, quad) : Lookups<kVector, Sum>{job}.sum(begin, end, column, width);
    sum.add_to(job, value);
    store_quad<kVector>(to, value, width);
  }

 private:
  // Whether a sum of this one lookup is float32 throughout. What points outside is refused where it is read.
  LAZYDP_DEVICE bool is_plain(int64_t begin) const {
    const int64_t lookup = job.order[begin];
    if (lookup < 0 || lookup >= job.lookups) return false;
    const int64_t bag = job.bag[lookup];
    if (bag < 0 || bag >= job.bags) return false;
    const auto scale = static_cast<double>(job.scale[bag]);
    return is_plain_weight(job.per_lookup ? scale * static_cast<double>(job.per_lookup[lookup]) : scale);
  }

  LAZYDP_DEVICE Sum sum_of_parts(int64_t begin, int64_t end, int64_t quad) const {
    Sum sum(job);
    for (int64_t chunk = begin / kChunk; chunk <= (end - 1) / kChunk; ++chunk) {
      const int64_t slot = 2 * chunk + (begin > chunk * kChunk ? 1 : 0);
      sum.add_part(job.workspace + (slot * quads + quad) * kPart);
    }
    return sum;
  }
};

template <bool kVector, class Sum>
cudaError_t launch(const ScatterAdd& job, cudaStream_t stream) {
  const int64_t quads = quads_of(job.columns);
  const Divider divider(quads);
  const cudaError_t error =
      each(PartialSums<kVector, Sum>{job, divider, quads, job.groups > 0 ? slots_of(job.lookups) * quads : 0}, stream);
  return error == cudaSuccess ? each(AddRows<kVector, Sum>{job, divider, quads, job.groups * quads}, stream) : error;
}

}  // namespace

cudaError_t bag_sum(const BagSum& job, cudaStream_t stream) { return launch(job, false, stream); }

cudaError_t bag_sum_but_single(const BagSum& job, cudaStream_t stream) { return launch(job, true, stream); }

int64_t bag_squared_norms_workspace(int64_t features, int64_t examples) {
  return (pairs_of(features) + 2 * features) * examples;
}

cudaError_t bag_squared_norms(const BagSquaredNorms& job, cudaStream_t stream) {
  const int64_t pairs = pairs_of(job.features);
  const Divider examples(job.examples);
  const int64_t tiles = pairs * job.examples;
  cudaError_t error = rows_are_aligned(job.grad, job.columns) ? each_tile(PairNorms<true>{job, examples, tiles}, stream)
                                                              : each_tile(PairNorms<false>{job, examples, tiles}, stream);
  if (error == cudaSuccess) error = each_tile(TermSizes{job, job.workspace + tiles, job.features * job.examples}, stream);
  return error == cudaSuccess ? each(SumPairs{job, pairs, job.examples}, stream) : error;
}

int64_t scatter_add_workspace(int64_t lookups, int64_t columns) { return slots_of(lookups) * quads_of(columns) * kPart; }

cudaError_t scatter_add(const ScatterAdd& job, cudaStream_t stream) {
  if (rows_are_aligned(job.weight, job.columns) && rows_are_aligned(job.grad, job.columns))
    return job.grid > 0.0 ? launch<true, InGrids>(job, stream) : launch<true, InFloat>(job, stream);
  return job.grid > 0.0 ? launch<false, InGrids>(job, stream) : launch<false, InFloat>(job, stream);
}

}  // namespace lazydp::cuda
