// The CPU operators: checks what came from Python, then hands raw pointers to the cores.
//
// Every check is made before anything is written. A failed one throws std::invalid_argument, ValueError in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <limits>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "common/gaussian.h"
#include "common/tensor_arguments.h"
#include "cpu/bags.h"
#include "cpu/catch_up_bag_sum.h"
#include "cpu/noise.h"
#include "cpu/simd_level.h"
#include "cpu/torch_arguments.h"

namespace lazydp::cpu {
namespace {

// Calls wrong(begin, end) on ranges that cover [0, count), on all threads; true where one of them says so. The place is looked
// for afterwards, one after the other: it is needed once in a lifetime, the check at every step.
template <class F>
bool any_wrong(int64_t count, const F& wrong) {
  constexpr int64_t kEntriesPerTask = 32768;
  std::atomic<bool> any{false};
  torch_threads()(0, count, kEntriesPerTask, [&](int64_t begin, int64_t end) {
    if (wrong(begin, end)) any.store(true, std::memory_order_relaxed);
  });
  return any.load();
}

// Whether 0 <= value < limit fails for some value; without a branch in the loop, which so becomes one of vectors.
bool out_of_range(const int64_t* values, int64_t begin, int64_t end, int64_t limit) {
  uint64_t signs = 0;
  const auto highest = static_cast<uint64_t>(limit) - 1;
  for (int64_t i = begin; i < end; ++i)
    signs |= static_cast<uint64_t>(values[i]) | (highest - static_cast<uint64_t>(values[i]));
  return begin < end && (signs >> 63 != 0 || limit <= 0);
}

// Whether some value of [begin, end) is negative, or less than the one before it plus `step`.
bool descends(const int64_t* values, int64_t begin, int64_t end, int64_t step) {
  uint64_t signs = begin < end ? static_cast<uint64_t>(values[begin]) : 0;
  for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) {
    const auto value = static_cast<uint64_t>(values[i]);
    signs |= value | (value - static_cast<uint64_t>(values[i - 1]) - static_cast<uint64_t>(step));
  }
  return signs >> 63 != 0;
}

// ---- values, which are looked at on all threads once every tensor is known to be what it should ----

void check_indices(std::span<const int64_t> indices, const char* name, int64_t num_rows) {
  const int64_t* values = indices.data();
  const auto count = static_cast<int64_t>(indices.size());
  if (!any_wrong(count, [=](int64_t begin, int64_t end) { return out_of_range(values, begin, end, num_rows); })) return;
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= num_rows)
      refuse(name, "[", i, "]: expected 0 <= index < ", num_rows, ", found ", values[i]);
}

void check_distinct_rows(std::span<const int64_t> rows, int64_t num_rows) {
  check_indices(rows, "rows", num_rows);
  const int64_t* row = rows.data();
  const auto count = static_cast<int64_t>(rows.size());
  if (!any_wrong(count, [=](int64_t begin, int64_t end) { return descends(row, begin, end, 1); })) return;
  for (int64_t i = 1; i < count; ++i)
    if (row[i] <= row[i - 1])
      refuse("rows[", i, "]: expected more than ", row[i - 1], " (rows must ascend and be distinct), found ", row[i]);
}

void check_offsets(std::span<const int64_t> offsets, int64_t count) {
  const auto n = static_cast<int64_t>(offsets.size());
  if (n < 1) refuse("offsets: expected at least one entry (bags + 1), found none");
  if (offsets[0] != 0) refuse("offsets[0]: expected 0, found ", offsets[0]);
  const int64_t* end = offsets.data();
  if (any_wrong(n, [=](int64_t begin, int64_t after) { return descends(end, begin, after, 0); }))
    for (int64_t i = 1; i < n; ++i)
      if (end[i] < end[i - 1])
        refuse("offsets[", i, "]: expected at least ", end[i - 1], " (offsets must not decrease), found ", end[i]);
  if (offsets[n - 1] != count)
    refuse("offsets[", n - 1, "]: expected ", count, " (the number of lookups), found ", offsets[n - 1]);
}

void check_starting_steps(const CatchUp& catch_up, int64_t horizon) {
  const auto wrong = [=](int64_t begin, int64_t end) {
    bool any = false;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = catch_up.last[catch_up.row(i)];
      any |= from != catch_up.step && (from < 0 || from > catch_up.step || from >= horizon);
    }
    return any;
  };
  if (!any_wrong(catch_up.count, wrong)) return;
  for (int64_t i = 0; i < catch_up.count; ++i) {
    const int64_t row = catch_up.row(i);
    const int64_t from = catch_up.last[row];
    if (from == catch_up.step) continue;
    if (from < 0 || from > catch_up.step)
      refuse("last[", row, "]: expected 0 <= last <= step ", catch_up.step, ", found ", from);
    if (from >= horizon)
      refuse("transition: row ", row, " has pending noise since step ", from, ", but there are only ", horizon,
             " starting steps");
  }
}

void check_listed(const CatchUp& catch_up, int64_t num_rows, int64_t horizon) {
  check_distinct_rows({catch_up.rows, static_cast<size_t>(catch_up.count)}, num_rows);
  check_starting_steps(catch_up, horizon);
}

// Does check(j) for each table j, on all threads; what the first of them refuses is thrown once all are through.
template <class F>
void check_tables(size_t tables, const F& check) {
  std::vector<std::exception_ptr> refused(tables);
  torch_threads().each(static_cast<int64_t>(tables), [&](int64_t j) {
    try {
      check(j);
    } catch (...) {
      refused[j] = std::current_exception();
    }
  });
  for_each_table(tables, [&](size_t j) {
    if (refused[j]) std::rethrow_exception(refused[j]);
  });
}

// ---- arguments ----

std::span<const int64_t> read_ids(const Tensor& tensor, const char* name) {
  check(tensor, name, ScalarType::Long, 1);
  return {read<int64_t>(tensor), static_cast<size_t>(tensor.size(0))};
}

std::vector<std::span<const int64_t>> read_ids(const Tensors& tensors, const char* name) {
  std::vector<std::span<const int64_t>> ids(tensors.size());
  for_each_table(tensors.size(), [&](size_t j) { ids[j] = read_ids(tensors[j], name); });
  return ids;
}

CatchUp read_catch_up(const Tensor& weight, const Tensor& last, const Tensor& key, int64_t table, int64_t first_row,
                      int64_t step, const Tensor& transition, const Tensor& factor, const std::optional<Tensor>& momentum,
                      bool ones) {
  check_catch_up(check, weight, last, transition, factor, momentum);
  return {write<float>(weight),
          momentum ? write<float>(*momentum) : nullptr,
          write<int32_t>(last),
          nullptr,
          weight.size(0),
          weight.size(1),
          read<float>(transition),
          read<float>(factor),
          read_key(key),
          checked_table(table),
          checked_step(step),
          ones ? Distribution::kOnes : Distribution::kGaussian,
          nullptr,
          checked_first_row(first_row, weight.size(0))};
}

// Of the table j of `tables`; the rows still have to be checked (check_listed).
CatchUp read_listed(const CatchUpTables& tables, size_t j, const Tensor& rows) {
  CatchUp catch_up = read_catch_up(tables.weights[j], tables.last[j], tables.key, tables.tables[j], tables.first_rows[j],
                                   tables.step, tables.transition, tables.factor, tables.momentum(j), tables.ones);
  const auto ids = read_ids(rows, "rows");
  catch_up.rows = ids.data();
  catch_up.count = static_cast<int64_t>(ids.size());
  return catch_up;
}

// The lookups of several tables and the sums of their bags.
struct BagSums {
  std::vector<BagSum> jobs;
  Tensors out;

  // Where `given` has no memory for the sums, they get their own.
  BagSums(const Tensors& weights, const Tensors& indices, const Tensors& offsets, const OptionalTensors& per_lookup_weights,
          const Tensors* given)
      : jobs(weights.size()), weights_(weights), indices_(indices), offsets_(offsets) {
    if (given) check_count(*given, "sums", weights.size());
    check_count(indices, "indices", weights.size());
    check_count(offsets, "offsets", weights.size());
    check_count(per_lookup_weights, "per_lookup_weights", weights.size());
    for_each_table(weights.size(), [&](size_t j) {
      check(weights[j], "weight", ScalarType::Float, 2);
      const auto ids = read_ids(indices[j], "indices");
      const auto ends = read_ids(offsets[j], "offsets");
      if (ends.empty()) check_offsets(ends, 0);
      const float* per_lookup = read_per_lookup(check, per_lookup_weights[j], indices[j].size(0));
      const auto bags = static_cast<int64_t>(ends.size()) - 1;
      const int64_t columns = weights[j].size(1);
      out.push_back(given ? (*given)[j] : torch::stable::new_empty(weights[j], {bags, columns}));
      float* const sums = write_sums(check, out[j], bags, columns);
      jobs[j] = {read<float>(weights[j]), ids.data(), ends.data(), per_lookup, sums, bags, columns};
    });
  }

  void check_values(size_t j) const {
    check_indices({jobs[j].indices, static_cast<size_t>(indices_[j].size(0))}, "indices", weights_[j].size(0));
    check_offsets({jobs[j].offsets, static_cast<size_t>(offsets_[j].size(0))}, indices_[j].size(0));
  }

 private:
  const Tensors& weights_;
  const Tensors& indices_;
  const Tensors& offsets_;
};

// The groups of several tables' lookups, and the bags that the lookups belong to.
struct Groupings {
  std::vector<Grouping> jobs;

  // Of tensors that were checked.
  explicit Groupings(const GroupTables& groups) {
    for (size_t j = 0; j < groups.rows.size(); ++j) {
      lookups_.push_back(static_cast<size_t>(groups.order[j].size(0)));
      jobs.push_back({read<int64_t>(groups.rows[j]), read<int64_t>(groups.order[j]), read<int64_t>(groups.starts[j]),
                      read<int64_t>(groups.bag_of_lookup[j]), groups.rows[j].size(0)});
    }
  }

  int64_t lookups(size_t j) const { return static_cast<int64_t>(lookups_[j]); }

  void check_values(size_t j, int64_t num_rows, int64_t bags) const {
    const Grouping& job = jobs[j];
    check_distinct_rows({job.rows, static_cast<size_t>(job.count)}, num_rows);
    check_indices({job.order, lookups_[j]}, "order", lookups(j));
    check_offsets({job.starts, static_cast<size_t>(job.count) + 1}, lookups(j));
    check_indices({job.bag, lookups_[j]}, "bag_of_lookup", bags);
  }

 private:
  std::vector<size_t> lookups_;
};

// ---- operators ----

void normal_(const Tensor& out, const Tensor& key, int64_t table, int64_t first_row, int64_t step) {
  fill_normals(read_fill(check, out, key, table, first_row, step), torch_threads());
}

std::tuple<Tensors, Tensors, Tensors> foreach_group_rows(const Tensors& indices, const std::vector<int64_t>& num_rows) {
  check_count(num_rows, "num_rows", indices.size());
  const auto ids = read_ids(indices, "indices");
  check_tables(ids.size(), [&](size_t j) { check_indices(ids[j], "indices", num_rows[j]); });
  Tensors rows, order, starts;
  std::vector<GroupRows> jobs;
  for (size_t j = 0; j < ids.size(); ++j) {
    const auto count = static_cast<int64_t>(ids[j].size());
    rows.push_back(torch::stable::new_empty(indices[j], {count}));
    order.push_back(torch::stable::new_empty(indices[j], {count}));
    starts.push_back(torch::stable::new_empty(indices[j], {count + 1}));
    jobs.push_back(
        {ids[j].data(), count, num_rows[j], write<int64_t>(rows[j]), write<int64_t>(order[j]), write<int64_t>(starts[j])});
  }
  group_rows(jobs, torch_threads());
  for (size_t j = 0; j < ids.size(); ++j) {
    rows[j] = torch::stable::narrow(rows[j], 0, 0, jobs[j].groups);
    starts[j] = torch::stable::narrow(starts[j], 0, 0, jobs[j].groups + 1);
  }
  return {rows, order, starts};
}

Tensors foreach_bag_ids(const Tensors& offsets) {
  const auto ends = read_ids(offsets, "offsets");
  check_tables(ends.size(), [&](size_t j) { check_offsets(ends[j], ends[j].empty() ? 0 : ends[j].back()); });
  Tensors out;
  std::vector<BagIds> jobs;
  for (size_t j = 0; j < ends.size(); ++j) {
    out.push_back(torch::stable::new_empty(offsets[j], {ends[j].back()}));
    jobs.push_back({ends[j].data(), static_cast<int64_t>(ends[j].size()) - 1, write<int64_t>(out[j])});
  }
  bag_of_lookups(jobs, torch_threads());
  return out;
}

void foreach_catch_up_(const Tensors& weights, const Tensors& last, const Tensors& rows, const Tensor& key,
                       const std::vector<int64_t>& tables, const std::vector<int64_t>& first_rows, int64_t step,
                       const Tensor& transition, const Tensor& factor, const Tensors& momenta, bool ones) {
  const CatchUpTables catch_ups{weights, last, key, tables, first_rows, step, transition, factor, momenta, ones};
  catch_ups.check_lists().check_unread(rows, "rows");
  check_count(rows, "rows", weights.size());
  std::vector<CatchUp> jobs;
  for_each_table(weights.size(), [&](size_t j) { jobs.push_back(read_listed(catch_ups, j, rows[j])); });
  check_tables(jobs.size(), [&](size_t j) { check_listed(jobs[j], weights[j].size(0), transition.size(0)); });
  catch_up_rows(jobs, torch_threads());
}

void flush_(const Tensor& weight, const Tensor& last, const Tensor& key, int64_t table, int64_t first_row, int64_t step,
            const Tensor& transition, const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  const CatchUp catch_up = read_catch_up(weight, last, key, table, first_row, step, transition, factor, momentum, ones);
  check_starting_steps(catch_up, transition.size(0));
  catch_up_rows({&catch_up, 1}, torch_threads());
}

Tensors foreach_bag_sum(const Tensors& weights, const Tensors& indices, const Tensors& offsets,
                        const OptionalTensors& per_lookup_weights) {
  const BagSums sums(weights, indices, offsets, per_lookup_weights, nullptr);
  check_tables(sums.jobs.size(), [&](size_t j) { sums.check_values(j); });
  bag_sum(sums.jobs, torch_threads());
  return sums.out;
}

void foreach_catch_up_bag_sum_(const Tensors& weights, const Tensors& last, const Tensors& rows, const Tensors& order,
                               const Tensors& starts, const Tensor& key, const std::vector<int64_t>& tables,
                               const std::vector<int64_t>& first_rows, int64_t step, const Tensor& transition,
                               const Tensor& factor, const Tensors& momenta, bool ones, const Tensors& indices,
                               const Tensors& offsets, const Tensors& bag_of_lookup, const OptionalTensors& per_lookup_weights,
                               const Tensors& sums) {
  const CatchUpTables catch_ups{weights, last, key, tables, first_rows, step, transition, factor, momenta, ones};
  const GroupTables group_tables{rows, order, starts, bag_of_lookup};
  const Written written = catch_ups.check_lists(sums);
  group_tables.check_unread(written);
  written.check_unread(indices, "indices");
  written.check_unread(offsets, "offsets");
  written.check_unread(per_lookup_weights, "per_lookup_weights");
  const BagSums bags(weights, indices, offsets, per_lookup_weights, &sums);
  group_tables.check_tensors(check, weights.size());
  const Groupings groups(group_tables);
  std::vector<CatchUpBagSum> jobs;
  for_each_table(weights.size(), [&](size_t j) {
    check_size(order[j], "order", 0, indices[j].size(0), "lookups");
    jobs.push_back({read_listed(catch_ups, j, rows[j]), bags.jobs[j], groups.jobs[j]});
  });
  check_tables(jobs.size(), [&](size_t j) {
    bags.check_values(j);
    groups.check_values(j, weights[j].size(0), bags.jobs[j].bags);
    check_starting_steps(jobs[j].catch_up, transition.size(0));
  });
  catch_up_bag_sum(jobs, torch_threads());
}

Tensor foreach_bag_sq_norms(const Tensors& indices, const Tensors& offsets, const Tensors& grads,
                            const OptionalTensors& per_lookup_weights) {
  check_count(indices, "indices", grads.size());
  check_count(offsets, "offsets", grads.size());
  check_count(per_lookup_weights, "per_lookup_weights", grads.size());
  std::vector<BagSquaredNorms> jobs;
  for_each_table(grads.size(), [&](size_t j) {
    const Tensor& grad = grads[j];
    check(grad, "grad", ScalarType::Float, 3);
    check_size(grad, "grad", 1, grads[0].size(1), "examples of the first table");
    const auto ids = read_ids(indices[j], "indices");
    const auto ends = read_ids(offsets[j], "offsets");
    check_size(offsets[j], "offsets", 0, grad.size(0) * grad.size(1) + 1, "features * examples of grad + 1");
    const float* per_lookup = read_per_lookup(check, per_lookup_weights[j], indices[j].size(0));
    jobs.push_back({ids.data(), ends.data(), per_lookup, read<float>(grad), grad.size(0), grad.size(1), grad.size(2)});
  });
  check_tables(jobs.size(), [&](size_t j) {
    const auto count = static_cast<size_t>(indices[j].size(0));
    check_indices({jobs[j].indices, count}, "indices", std::numeric_limits<int64_t>::max());
    check_offsets({jobs[j].offsets, static_cast<size_t>(offsets[j].size(0))}, indices[j].size(0));
  });
  Tensor out = torch::stable::new_empty(grads[0], {grads[0].size(1)}, ScalarType::Double);
  bag_squared_norms(jobs, grads[0].size(1), write<double>(out), torch_threads());
  return out;
}

void foreach_scatter_add_(const Tensors& weights, const Tensors& rows, const Tensors& order, const Tensors& starts,
                          const Tensors& bag_of_lookup, const Tensors& grads, const Tensors& scales, double alpha,
                          const OptionalTensors& per_lookup_weights, double grid) {
  const GroupTables group_tables{rows, order, starts, bag_of_lookup};
  check_scatter(check, weights, group_tables, grads, scales, per_lookup_weights, grid);
  const Groupings groups(group_tables);
  std::vector<ScatterAdd> jobs;
  for_each_table(weights.size(), [&](size_t j) {
    const float* per_lookup = read_per_lookup(check, per_lookup_weights[j], groups.lookups(j));
    jobs.push_back({write<float>(weights[j]), groups.jobs[j], per_lookup, read<float>(grads[j]), read<float>(scales[j]), alpha,
                    grid, weights[j].size(1), grads[j].size(0)});
  });
  check_tables(jobs.size(), [&](size_t j) { groups.check_values(j, weights[j].size(0), grads[j].size(0)); });
  scatter_add(jobs, torch_threads());
}

Tensor chacha_words(const Tensor& key, int64_t stream, int64_t counter, int64_t n) {
  if (stream < 0) refuse("stream: expected stream >= 0, found ", stream);
  const int64_t blocks = n < 0 ? 0 : (n + kBlockWords - 1) / kBlockWords;
  if (n < 0) refuse("n: expected n >= 0, found ", n);
  if (counter < 0 || counter + blocks > (int64_t{1} << 32))
    refuse("counter: expected 0 <= counter and counter + ", blocks, " blocks <= 2^32, found ", counter);
  Tensor out = torch::stable::new_empty(key, {n}, ScalarType::Int);
  keystream(read_key(key), static_cast<uint64_t>(stream), static_cast<uint32_t>(counter), write<uint32_t>(out), n,
            torch_threads());
  return out;
}

Tensor chacha20_blocks(const Tensor& inputs) {
  check(inputs, "inputs", ScalarType::Int, 2);
  check_size(inputs, "inputs", 1, kBlockWords, "words of a block");
  constexpr uint32_t sigma[4] = {kSigma0, kSigma1, kSigma2, kSigma3};
  for (int64_t b = 0; b < inputs.size(0); ++b)
    if (std::memcmp(read<uint32_t>(inputs) + b * kBlockWords, sigma, sizeof sigma) != 0)
      refuse("inputs[", b, "]: expected the constants of RFC 8439 in the first four words");
  Tensor out = torch::stable::new_empty(inputs, {inputs.size(0), kBlockWords});
  noise_kernels().blocks_of_inputs(read<uint32_t>(inputs), inputs.size(0), write<uint32_t>(out));
  return out;
}

Tensor normals_of_blocks(const Tensor& words) {
  check(words, "words", ScalarType::Int, 2);
  check_size(words, "words", 1, kBlockWords, "words of a block");
  Tensor out = torch::stable::new_empty(words, {words.size(0), kNormalsPerBlock}, ScalarType::Float);
  noise_kernels().normals_of_blocks(read<uint32_t>(words), words.size(0), write<float>(out));
  return out;
}

int64_t simd_level_op() { return static_cast<int64_t>(simd_level()); }

int64_t best_simd_level_op() { return static_cast<int64_t>(best_simd_level()); }

void set_simd_level_op(int64_t level) {
  if (level < 0 || !set_simd_level(static_cast<SimdLevel>(level)))
    refuse("level: expected 0 <= level <= ", best_simd_level_op(), " (what this machine runs), found ", level);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lazydp, CPU, m) {
  m.impl("normal_", TORCH_BOX(&normal_));
  m.impl("flush_", TORCH_BOX(&flush_));
  m.impl("foreach_group_rows", TORCH_BOX(&foreach_group_rows));
  m.impl("foreach_bag_ids", TORCH_BOX(&foreach_bag_ids));
  m.impl("foreach_catch_up_", TORCH_BOX(&foreach_catch_up_));
  m.impl("foreach_bag_sum", TORCH_BOX(&foreach_bag_sum));
  m.impl("foreach_catch_up_bag_sum_", TORCH_BOX(&foreach_catch_up_bag_sum_));
  m.impl("foreach_bag_sq_norms", TORCH_BOX(&foreach_bag_sq_norms));
  m.impl("foreach_scatter_add_", TORCH_BOX(&foreach_scatter_add_));
  m.impl("chacha_words", TORCH_BOX(&chacha_words));
  m.impl("chacha20_blocks", TORCH_BOX(&chacha20_blocks));
  m.impl("normals_of_blocks", TORCH_BOX(&normals_of_blocks));
}

// No tensor among the arguments, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lazydp, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&simd_level_op));
  m.impl("best_simd_level", TORCH_BOX(&best_simd_level_op));
  m.impl("set_simd_level", TORCH_BOX(&set_simd_level_op));
}

}  // namespace lazydp::cpu
