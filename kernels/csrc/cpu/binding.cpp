// The CPU operators: checks what came from Python, then hands raw pointers to the cores.
//
// Every check is made before anything is written. A failed one throws std::invalid_argument, ValueError in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "common/gaussian.h"
#include "common/tensor_arguments.h"
#include "cpu/bags.h"
#include "cpu/catch_up_bag_sum.h"
#include "cpu/noise.h"
#include "cpu/simd_level.h"

namespace lazydp::cpu {
namespace {

Parallel torch_threads() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
    torch::stable::parallel_for(begin, end, grain, [=](int64_t from, int64_t to) { body(from, to, context); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

void check(const Tensor& tensor, const char* name, ScalarType type, int64_t dims) {
  if (!tensor.is_cpu()) refuse(name, ": expected a CPU tensor, found one on another device");
  check_layout(tensor, name, type, dims);
}

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
  for (int64_t i = begin; i < end; ++i) signs |= static_cast<uint64_t>(values[i]) | (highest - static_cast<uint64_t>(values[i]));
  return begin < end && (signs >> 63 != 0 || limit <= 0);
}

// Whether some value of [begin, end) is less than the one before it plus `step`. All values must lie in [0, 2^63).
bool descends(const int64_t* values, int64_t begin, int64_t end, int64_t step) {
  uint64_t signs = 0;
  for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) signs |= static_cast<uint64_t>(values[i] - values[i - 1] - step);
  return signs >> 63 != 0;
}

void check_indices(const Tensor& indices, const char* name, int64_t num_rows) {
  check(indices, name, ScalarType::Long, 1);
  const auto* values = read<int64_t>(indices);
  const int64_t count = indices.size(0);
  if (!any_wrong(count, [=](int64_t begin, int64_t end) { return out_of_range(values, begin, end, num_rows); })) return;
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= num_rows)
      refuse(name, "[", i, "]: expected 0 <= index < ", num_rows, ", found ", values[i]);
}

void check_distinct_rows(const Tensor& rows, int64_t num_rows) {
  check_indices(rows, "rows", num_rows);
  const auto* row = read<int64_t>(rows);
  const int64_t count = rows.size(0);
  if (!any_wrong(count, [=](int64_t begin, int64_t end) { return descends(row, begin, end, 1); })) return;
  for (int64_t i = 1; i < count; ++i)
    if (row[i] <= row[i - 1])
      refuse("rows[", i, "]: expected more than ", row[i - 1], " (rows must ascend and be distinct), found ", row[i]);
}

void check_offsets(const Tensor& offsets, int64_t count) {
  check(offsets, "offsets", ScalarType::Long, 1);
  const int64_t n = offsets.size(0);
  if (n < 1) refuse("offsets: expected at least one entry (bags + 1), found none");
  const auto* values = read<int64_t>(offsets);
  if (values[0] != 0) refuse("offsets[0]: expected 0, found ", values[0]);
  for (int64_t i = 1; i < n; ++i)
    if (values[i] < values[i - 1])
      refuse("offsets[", i, "]: expected at least ", values[i - 1], " (offsets must not decrease), found ", values[i]);
  if (values[n - 1] != count) refuse("offsets[", n - 1, "]: expected ", count, " (the number of lookups), found ", values[n - 1]);
}

void check_starting_steps(const int32_t* last, const int64_t* rows, int64_t count, int64_t step, int64_t horizon) {
  const auto wrong = [=](int64_t begin, int64_t end) {
    bool any = false;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = last[rows ? rows[i] : i];
      any |= from != step && (from < 0 || from > step || from >= horizon);
    }
    return any;
  };
  if (!any_wrong(count, wrong)) return;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows ? rows[i] : i;
    const int64_t from = last[row];
    if (from == step) continue;
    if (from < 0 || from > step) refuse("last[", row, "]: expected 0 <= last <= step ", step, ", found ", from);
    if (from >= horizon)
      refuse("transition: row ", row, " sleeps since step ", from, ", but there are only ", horizon, " starting steps");
  }
}

Wake read_wake(const Tensor& weight, const Tensor& last, const Tensor& key, int64_t table, int64_t step,
               const Tensor& transition, const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  check_wake(check, weight, last, transition, factor, momentum);
  return {write<float>(weight), momentum ? write<float>(*momentum) : nullptr, write<int32_t>(last), nullptr, weight.size(0),
          weight.size(1), read<float>(transition), read<float>(factor), read_key(key), checked_table(table),
          checked_step(step), ones ? Law::kOnes : Law::kGaussian};
}

void normal_(const Tensor& out, const Tensor& key, int64_t table, int64_t first_row, int64_t step) {
  fill_normals(read_fill(check, out, key, table, first_row, step), torch_threads());
}

std::tuple<Tensor, Tensor, Tensor> group_rows_op(const Tensor& indices, int64_t num_rows) {
  check_indices(indices, "indices", num_rows);
  const int64_t count = indices.size(0);
  Tensor rows = torch::stable::new_empty(indices, {count});
  Tensor order = torch::stable::new_empty(indices, {count});
  Tensor starts = torch::stable::new_empty(indices, {count + 1});
  const int64_t groups = group_rows(read<int64_t>(indices), count, num_rows, write<int64_t>(rows), write<int64_t>(order),
                                    write<int64_t>(starts), torch_threads());
  return {torch::stable::narrow(rows, 0, 0, groups), order, torch::stable::narrow(starts, 0, 0, groups + 1)};
}

Wake read_catch_up(const Tensor& weight, const Tensor& last, const Tensor& rows, const Tensor& key, int64_t table, int64_t step,
                   const Tensor& transition, const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  Wake wake = read_wake(weight, last, key, table, step, transition, factor, momentum, ones);
  check_distinct_rows(rows, weight.size(0));
  wake.rows = read<int64_t>(rows);
  wake.count = rows.size(0);
  check_starting_steps(wake.last, wake.rows, wake.count, step, transition.size(0));
  return wake;
}

void catch_up_(const Tensor& weight, const Tensor& last, const Tensor& rows, const Tensor& key, int64_t table, int64_t step,
               const Tensor& transition, const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  wake_rows(read_catch_up(weight, last, rows, key, table, step, transition, factor, momentum, ones), torch_threads());
}

void flush_(const Tensor& weight, const Tensor& last, const Tensor& key, int64_t table, int64_t step, const Tensor& transition,
            const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  const Wake wake = read_wake(weight, last, key, table, step, transition, factor, momentum, ones);
  check_starting_steps(wake.last, nullptr, wake.count, step, transition.size(0));
  wake_rows(wake, torch_threads());
}

// Checks the arguments; `out` is the memory for the sums.
BagSum read_bag_sum(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                    const std::optional<Tensor>& per_lookup_weights, std::optional<Tensor>& out) {
  check(weight, "weight", ScalarType::Float, 2);
  check_indices(indices, "indices", weight.size(0));
  check_offsets(offsets, indices.size(0));
  const float* per_lookup = read_per_lookup(check, per_lookup_weights, indices.size(0));
  const int64_t bags = offsets.size(0) - 1;
  out = torch::stable::new_empty(weight, {bags, weight.size(1)});
  return {read<float>(weight), read<int64_t>(indices), read<int64_t>(offsets), per_lookup, write<float>(*out), bags,
          weight.size(1)};
}

Tensor bag_sum_op(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                  const std::optional<Tensor>& per_lookup_weights) {
  std::optional<Tensor> out;
  bag_sum(read_bag_sum(weight, indices, offsets, per_lookup_weights, out), torch_threads());
  return *out;
}

Grouping read_groups(const Tensor& rows, const Tensor& order, const Tensor& starts, const Tensor& bag_of_lookup,
                     int64_t num_rows, int64_t bags) {
  check_distinct_rows(rows, num_rows);
  check_indices(order, "order", order.size(0));
  check_offsets(starts, order.size(0));
  check_size(starts, "starts", 0, rows.size(0) + 1, "rows + 1");
  check_indices(bag_of_lookup, "bag_of_lookup", bags);
  check_size(bag_of_lookup, "bag_of_lookup", 0, order.size(0), "lookups");
  return {read<int64_t>(rows), read<int64_t>(order), read<int64_t>(starts), read<int64_t>(bag_of_lookup), rows.size(0)};
}

Tensor catch_up_bag_sum_(const Tensor& weight, const Tensor& last, const Tensor& rows, const Tensor& order,
                         const Tensor& starts, const Tensor& key, int64_t table, int64_t step, const Tensor& transition,
                         const Tensor& factor, const std::optional<Tensor>& momentum, bool ones, const Tensor& indices,
                         const Tensor& offsets, const Tensor& bag_of_lookup,
                         const std::optional<Tensor>& per_lookup_weights) {
  std::optional<Tensor> out;
  const BagSum sum = read_bag_sum(weight, indices, offsets, per_lookup_weights, out);
  check_size(order, "order", 0, indices.size(0), "lookups");
  const Grouping groups = read_groups(rows, order, starts, bag_of_lookup, weight.size(0), sum.bags);
  catch_up_bag_sum(read_catch_up(weight, last, rows, key, table, step, transition, factor, momentum, ones), sum, groups,
                   torch_threads());
  return *out;
}

Tensor bag_ids_op(const Tensor& offsets) {
  check(offsets, "offsets", ScalarType::Long, 1);
  const int64_t entries = offsets.size(0);
  check_offsets(offsets, entries > 0 ? read<int64_t>(offsets)[entries - 1] : 0);
  Tensor out = torch::stable::new_empty(offsets, {read<int64_t>(offsets)[entries - 1]});
  bag_of_lookups(read<int64_t>(offsets), entries - 1, write<int64_t>(out), torch_threads());
  return out;
}

Tensor bag_sq_norms_op(const Tensor& indices, const Tensor& offsets, const Tensor& grad,
                       const std::optional<Tensor>& per_lookup_weights) {
  check(grad, "grad", ScalarType::Float, 3);
  check_indices(indices, "indices", std::numeric_limits<int64_t>::max());
  check_offsets(offsets, indices.size(0));
  check_size(offsets, "offsets", 0, grad.size(0) * grad.size(1) + 1, "features * examples of grad + 1");
  const float* per_lookup = read_per_lookup(check, per_lookup_weights, indices.size(0));
  Tensor out = torch::stable::new_empty(grad, {grad.size(1)});
  bag_squared_norms({read<int64_t>(indices), read<int64_t>(offsets), per_lookup, read<float>(grad), write<float>(out),
                     grad.size(0), grad.size(1), grad.size(2)},
                    torch_threads());
  return out;
}

void scatter_add_op(const Tensor& weight, const Tensor& rows, const Tensor& order, const Tensor& starts,
                    const Tensor& bag_of_lookup, const Tensor& grad, const Tensor& scale, double alpha,
                    const std::optional<Tensor>& per_lookup_weights) {
  check(weight, "weight", ScalarType::Float, 2);
  check(grad, "grad", ScalarType::Float, 2);
  check_size(grad, "grad", 1, weight.size(1), "columns of weight");
  check(scale, "scale", ScalarType::Float, 1);
  check_size(scale, "scale", 0, grad.size(0), "bags of grad");
  const Grouping groups = read_groups(rows, order, starts, bag_of_lookup, weight.size(0), grad.size(0));
  const float* per_lookup = read_per_lookup(check, per_lookup_weights, order.size(0));
  scatter_add({write<float>(weight), groups, per_lookup, read<float>(grad), read<float>(scale), static_cast<float>(alpha),
               weight.size(1)},
              torch_threads());
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
  m.impl("group_rows", TORCH_BOX(&group_rows_op));
  m.impl("catch_up_", TORCH_BOX(&catch_up_));
  m.impl("flush_", TORCH_BOX(&flush_));
  m.impl("bag_sum", TORCH_BOX(&bag_sum_op));
  m.impl("catch_up_bag_sum_", TORCH_BOX(&catch_up_bag_sum_));
  m.impl("bag_ids", TORCH_BOX(&bag_ids_op));
  m.impl("bag_sq_norms", TORCH_BOX(&bag_sq_norms_op));
  m.impl("scatter_add_", TORCH_BOX(&scatter_add_op));
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
