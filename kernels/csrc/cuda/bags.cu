// Sums, norms and gradients of bags. One thread owns four neighbouring columns of one row or bag, so that a warp moves whole
// rows, 16 bytes a lane; what one thread adds up, it adds in the order of the lookups. No atomics: results are deterministic.
#include "cuda/bags.h"

#include "cuda/divider.cuh"
#include "cuda/launch.cuh"
#include "cuda/quad.cuh"

namespace lazydp::cuda {
namespace {

constexpr int kInFlight = 4;  // loads of rows under way before the first is used

// One row of a sum, and its weight.
struct Term {
  float weight;
  Quad quad;
};

constexpr Term kNothing = {0.0f, {{0.0f, 0.0f, 0.0f, 0.0f}}};

// sum over n in [0, count) of term_at(n), in that order, several loads in flight.
template <class TermAt>
LAZYDP_DEVICE Quad sum_of(int64_t count, const TermAt& term_at) {
  Quad sum = same(0.0f);
  int64_t n = 0;
  for (; n + kInFlight <= count; n += kInFlight) {
    Term terms[kInFlight];
    LAZYDP_UNROLL
    for (int j = 0; j < kInFlight; ++j) terms[j] = term_at(n + j);
    LAZYDP_UNROLL
    for (int j = 0; j < kInFlight; ++j) add_product(sum, terms[j].weight, terms[j].quad);
  }
  for (; n < count; ++n) {
    const Term term = term_at(n);
    add_product(sum, term.weight, term.quad);
  }
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
    const Quad sum = sum_of(size, [&](int64_t n) -> Term {
      const int64_t row = job.indices[begin + n];
      if (row < 0 || row >= job.num_rows) {
        outside = true;
        return kNothing;
      }
      const float weight = job.per_lookup ? job.per_lookup[begin + n] : 1.0f;
      return {weight, load_quad<kVector>(job.weight + row * job.columns + column, width)};
    });
    if (outside) LAZYDP_REFUSE("indices: expected 0 <= index < rows of weight");
    store_quad<kVector>(job.out + bag * job.columns + column, sum, width);
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

struct SumPairs {
  BagSquaredNorms job;
  int64_t pairs;
  int64_t count;

  LAZYDP_DEVICE void operator()(int64_t example) const {
    double norm = 0.0;
    for (int64_t pair = 0; pair < pairs; ++pair) norm += job.workspace[pair * job.examples + example];
    const auto found = static_cast<float>(norm < 0.0 ? 0.0 : norm);  // rounding may leave it just below 0; NaN stays
    job.out[example] = job.add ? job.out[example] + found : found;
  }
};

// A row that many lookups read (the common values of a small table) would keep one warp busy while the others idle. Rows
// of more than kChunk lookups are therefore added up in two rounds: first the part of the row that lies in each aligned
// chunk of kChunk sorted lookups, then the parts, in order. A chunk meets at most two such rows, the one that holds its
// first lookup (slot 2 c) and one that begins after it (slot 2 c + 1).
constexpr int64_t kChunk = 32;

int64_t slots_of(int64_t lookups) { return (lookups + kChunk - 1) / kChunk * 2; }

template <bool kVector>
struct Lookups {
  ScatterAdd job;

  LAZYDP_DEVICE Quad sum(int64_t begin, int64_t end, int64_t column, int width) const {
    bool order_outside = false;
    bool bag_outside = false;
    const Quad total = sum_of(end - begin, [&](int64_t n) -> Term {
      const int64_t lookup = job.order[begin + n];
      order_outside |= lookup < 0 || lookup >= job.lookups;
      if (order_outside) return kNothing;
      const int64_t bag = job.bag[lookup];
      bag_outside |= bag < 0 || bag >= job.bags;
      if (bag_outside) return kNothing;
      const float scale = job.scale[bag];
      const float weight = job.per_lookup ? scale * job.per_lookup[lookup] : scale;
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

template <bool kVector>
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
    const Quad sum = Lookups<kVector>{job}.sum(begin > chunk_begin ? begin : chunk_begin, end < chunk_end ? end : chunk_end,
                                               column, quad_width(column, job.columns));
    store_quad<true>(job.workspace + i * kQuad, sum, kQuad);
  }
};

template <bool kVector>
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
    add_product(value, job.alpha,
                end - begin > kChunk ? sum_of_parts(begin, end, quad) : Lookups<kVector>{job}.sum(begin, end, column, width));
    store_quad<kVector>(to, value, width);
  }

 private:
  LAZYDP_DEVICE Quad sum_of_parts(int64_t begin, int64_t end, int64_t quad) const {
    const int64_t first = begin / kChunk;
    return sum_of((end - 1) / kChunk - first + 1, [&](int64_t n) -> Term {
      const int64_t chunk = first + n;
      const int64_t slot = 2 * chunk + (begin > chunk * kChunk ? 1 : 0);
      return {1.0f, load_quad<true>(job.workspace + (slot * quads + quad) * kQuad, kQuad)};
    });
  }
};

template <bool kVector>
cudaError_t launch(const ScatterAdd& job, cudaStream_t stream) {
  const int64_t quads = quads_of(job.columns);
  const Divider divider(quads);
  const cudaError_t error =
      each(PartialSums<kVector>{job, divider, quads, job.groups > 0 ? slots_of(job.lookups) * quads : 0}, stream);
  return error == cudaSuccess ? each(AddRows<kVector>{job, divider, quads, job.groups * quads}, stream) : error;
}

}  // namespace

cudaError_t bag_sum(const BagSum& job, cudaStream_t stream) { return launch(job, false, stream); }

cudaError_t bag_sum_but_single(const BagSum& job, cudaStream_t stream) { return launch(job, true, stream); }

int64_t bag_squared_norms_workspace(int64_t features, int64_t examples) { return pairs_of(features) * examples; }

cudaError_t bag_squared_norms(const BagSquaredNorms& job, cudaStream_t stream) {
  const int64_t pairs = pairs_of(job.features);
  const Divider examples(job.examples);
  const int64_t tiles = pairs * job.examples;
  const cudaError_t error = rows_are_aligned(job.grad, job.columns) ? each_tile(PairNorms<true>{job, examples, tiles}, stream)
                                                                    : each_tile(PairNorms<false>{job, examples, tiles}, stream);
  return error == cudaSuccess ? each(SumPairs{job, pairs, job.examples}, stream) : error;
}

int64_t scatter_add_workspace(int64_t lookups, int64_t columns) { return slots_of(lookups) * quads_of(columns) * kQuad; }

cudaError_t scatter_add(const ScatterAdd& job, cudaStream_t stream) {
  if (rows_are_aligned(job.weight, job.columns) && rows_are_aligned(job.grad, job.columns)) return launch<true>(job, stream);
  return launch<false>(job, stream);
}

}  // namespace lazydp::cuda
