// The CUDA operators under the schemas of cpu/schema.cpp: checks shapes, types and devices, finds the current stream, hands raw
// pointers to the launchers. What lies in device memory is not looked at here, for that would make the host wait: the
// kernels check it themselves (LAZYDP_REFUSE).
//
// Differences from the CPU operators, the first two for the same reason: group_rows returns lists as long as the lookups, padded
// as csrc/cuda/rows.h says; an index out of range is an error of the device, reported by a later call; and bags of lookups are
// found by torch (ops.foreach_bag_ids).
//
// Workspaces come from torch's caching allocator: in stream order, and from the graph's own pool under capture (of the
// operators that draw no noise; those that do refuse it).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensor_arguments.h"
#include "cuda/bags.h"
#include "cuda/group_rows.h"
#include "cuda/noise.h"

namespace lazydp::cuda {
namespace {

void check_launch(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The device and stream of one call, made current while it lasts; every tensor must live on that device.
class Call {
 public:
  explicit Call(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // A graph repeats the arguments it was captured with. The same step twice is the same noise twice (whoever subtracts
  // two models sees the data without noise), or none: what draws noise must be launched anew at every step.
  void refuse_capture() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_launch(cudaStreamIsCapturing(stream_, &status));
    if (status != cudaStreamCaptureStatusNone)
      refuse(
          "noise cannot be captured in a CUDA graph: every replay would draw that of the same step; capture the dense part "
          "only");
  }

  // Checks where a tensor lives, and how it lies there.
  void operator()(const Tensor& tensor, const char* name, ScalarType type, int64_t dims) const {
    if (!tensor.is_cuda() || tensor.get_device_index() != device_) refuse(name, ": expected a tensor on cuda:", device_);
    check_layout(tensor, name, type, dims);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void check_offsets(const Call& call, const Tensor& offsets) {
  call(offsets, "offsets", ScalarType::Long, 1);
  if (offsets.size(0) < 1) refuse("offsets: expected at least one entry (bags + 1), found none");
}

CatchUp read_catch_up(const Call& call, const Tensor& weight, const Tensor& last, const Tensor& key, int64_t table,
                      int64_t first_row, int64_t step, const Tensor& transition, const Tensor& factor,
                      const std::optional<Tensor>& momentum, bool ones) {
  check_catch_up(call, weight, last, transition, factor, momentum);
  return {write<float>(weight),
          momentum ? write<float>(*momentum) : nullptr,
          write<int32_t>(last),
          nullptr,
          weight.size(0),
          weight.size(0),
          weight.size(1),
          read<float>(transition),
          read<float>(factor),
          transition.size(0),
          read_key(key),
          checked_table(table),
          checked_step(step),
          ones,
          checked_first_row(first_row, weight.size(0))};
}

// Of the table j of `tables`.
CatchUp read_listed(const Call& call, const CatchUpTables& tables, size_t j, const Tensor& rows) {
  CatchUp catch_up = read_catch_up(call, tables.weights[j], tables.last[j], tables.key, tables.tables[j], tables.first_rows[j],
                                   tables.step, tables.transition, tables.factor, tables.momentum(j), tables.ones);
  call(rows, "rows", ScalarType::Long, 1);
  catch_up.rows = read<int64_t>(rows);
  catch_up.count = rows.size(0);
  return catch_up;
}

// The lookups of several tables and the sums of their bags.
struct BagSums {
  std::vector<BagSum> jobs;
  Tensors out;

  // Where `given` has no memory for the sums, they get their own.
  BagSums(const Call& call, const Tensors& weights, const Tensors& indices, const Tensors& offsets,
          const OptionalTensors& per_lookup_weights, const Tensors* given) {
    if (given) check_count(*given, "sums", weights.size());
    check_count(indices, "indices", weights.size());
    check_count(offsets, "offsets", weights.size());
    check_count(per_lookup_weights, "per_lookup_weights", weights.size());
    for_each_table(weights.size(), [&](size_t j) {
      call(weights[j], "weight", ScalarType::Float, 2);
      call(indices[j], "indices", ScalarType::Long, 1);
      check_offsets(call, offsets[j]);
      const float* per_lookup = read_per_lookup(call, per_lookup_weights[j], indices[j].size(0));
      const int64_t bags = offsets[j].size(0) - 1;
      const int64_t columns = weights[j].size(1);
      out.push_back(given ? (*given)[j] : torch::stable::new_empty(weights[j], {bags, columns}));
      float* const sums = write_sums(call, out[j], bags, columns);
      jobs.push_back({read<float>(weights[j]), read<int64_t>(indices[j]), read<int64_t>(offsets[j]), per_lookup, sums,
                      weights[j].size(0), bags, columns});
    });
  }
};

void normal_(const Tensor& out, const Tensor& key, int64_t table, int64_t first_row, int64_t step) {
  const Call call(out);
  call.refuse_capture();
  check_launch(fill_normals(read_fill(call, out, key, table, first_row, step), call.stream()));
}

std::tuple<Tensors, Tensors, Tensors> foreach_group_rows(const Tensors& indices, const std::vector<int64_t>& num_rows) {
  const Call call(first_of(indices, "indices"));
  check_count(num_rows, "num_rows", indices.size());
  Tensors rows, order, starts, workspaces;
  std::vector<GroupRows> jobs;
  for_each_table(indices.size(), [&](size_t j) {
    call(indices[j], "indices", ScalarType::Long, 1);
    const int64_t lookups = indices[j].size(0);
    size_t bytes = 0;
    check_launch(group_rows_workspace(lookups, num_rows[j], &bytes));
    rows.push_back(torch::stable::new_empty(indices[j], {lookups}));
    order.push_back(torch::stable::new_empty(indices[j], {lookups}));
    starts.push_back(torch::stable::new_empty(indices[j], {lookups + 1}));
    void* workspace = nullptr;
    if (bytes > 0) {
      workspaces.push_back(torch::stable::new_empty(indices[j], {static_cast<int64_t>(bytes)}, ScalarType::Byte));
      workspace = write<uint8_t>(workspaces.back());
    }
    jobs.push_back({read<int64_t>(indices[j]), write<int64_t>(rows[j]), write<int64_t>(order[j]), write<int64_t>(starts[j]),
                    workspace, bytes, lookups, num_rows[j]});
  });
  check_launch(group_rows(jobs, call.stream()));
  return {rows, order, starts};
}

void foreach_catch_up_(const Tensors& weights, const Tensors& last, const Tensors& rows, const Tensor& key,
                       const std::vector<int64_t>& tables, const std::vector<int64_t>& first_rows, int64_t step,
                       const Tensor& transition, const Tensor& factor, const Tensors& momenta, bool ones) {
  const Call call(first_of(weights, "weights"));
  call.refuse_capture();
  const CatchUpTables catch_ups{weights, last, key, tables, first_rows, step, transition, factor, momenta, ones};
  catch_ups.check_lists().check_unread(rows, "rows");
  check_count(rows, "rows", weights.size());
  std::vector<CatchUp> jobs;
  for_each_table(weights.size(), [&](size_t j) { jobs.push_back(read_listed(call, catch_ups, j, rows[j])); });
  for (const CatchUp& job : jobs) check_launch(catch_up_rows(job, call.stream()));
}

void flush_(const Tensor& weight, const Tensor& last, const Tensor& key, int64_t table, int64_t first_row, int64_t step,
            const Tensor& transition, const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  const Call call(weight);
  call.refuse_capture();
  check_launch(catch_up_rows(read_catch_up(call, weight, last, key, table, first_row, step, transition, factor, momentum, ones),
                             call.stream()));
}

Tensors foreach_bag_sum(const Tensors& weights, const Tensors& indices, const Tensors& offsets,
                        const OptionalTensors& per_lookup_weights) {
  const Call call(first_of(weights, "weights"));
  const BagSums sums(call, weights, indices, offsets, per_lookup_weights, nullptr);
  for (const BagSum& job : sums.jobs) check_launch(bag_sum(job, call.stream()));
  return sums.out;
}

void foreach_catch_up_bag_sum_(const Tensors& weights, const Tensors& last, const Tensors& rows, const Tensors& order,
                               const Tensors& starts, const Tensor& key, const std::vector<int64_t>& tables,
                               const std::vector<int64_t>& first_rows, int64_t step, const Tensor& transition,
                               const Tensor& factor, const Tensors& momenta, bool ones, const Tensors& indices,
                               const Tensors& offsets, const Tensors& bag_of_lookup, const OptionalTensors& per_lookup_weights,
                               const Tensors& sums) {
  const Call call(first_of(weights, "weights"));
  call.refuse_capture();
  const CatchUpTables catch_ups{weights, last, key, tables, first_rows, step, transition, factor, momenta, ones};
  const GroupTables groups{rows, order, starts, bag_of_lookup};
  const Written written = catch_ups.check_lists(sums);
  groups.check_unread(written);
  written.check_unread(indices, "indices");
  written.check_unread(offsets, "offsets");
  written.check_unread(per_lookup_weights, "per_lookup_weights");
  const BagSums bags(call, weights, indices, offsets, per_lookup_weights, &sums);
  groups.check_tensors(call, weights.size());
  std::vector<CatchUp> jobs;
  for_each_table(weights.size(), [&](size_t j) {
    check_size(order[j], "order", 0, indices[j].size(0), "lookups");
    jobs.push_back(read_listed(call, catch_ups, j, rows[j]));
  });
  for (size_t j = 0; j < jobs.size(); ++j)
    check_launch(catch_up_and_sum(jobs[j], {read<int64_t>(order[j]), read<int64_t>(starts[j]), read<int64_t>(bag_of_lookup[j])},
                                  bags.jobs[j], call.stream()));
}

Tensor foreach_bag_sq_norms(const Tensors& indices, const Tensors& offsets, const Tensors& grads,
                            const OptionalTensors& per_lookup_weights) {
  const Call call(first_of(grads, "grads"));
  check_count(indices, "indices", grads.size());
  check_count(offsets, "offsets", grads.size());
  check_count(per_lookup_weights, "per_lookup_weights", grads.size());
  Tensor out = torch::stable::new_empty(grads[0], {grads[0].dim() == 3 ? grads[0].size(1) : 0}, ScalarType::Double);
  std::vector<BagSquaredNorms> jobs;
  int64_t most_pairs = 0;
  for_each_table(grads.size(), [&](size_t j) {
    const Tensor& grad = grads[j];
    call(grad, "grad", ScalarType::Float, 3);
    check_size(grad, "grad", 1, grads[0].size(1), "examples of the first table");
    call(indices[j], "indices", ScalarType::Long, 1);
    check_offsets(call, offsets[j]);
    check_size(offsets[j], "offsets", 0, grad.size(0) * grad.size(1) + 1, "features * examples of grad + 1");
    const float* per_lookup = read_per_lookup(call, per_lookup_weights[j], indices[j].size(0));
    most_pairs = std::max(most_pairs, bag_squared_norms_workspace(grad.size(0), grad.size(1)));
    jobs.push_back({read<int64_t>(indices[j]), read<int64_t>(offsets[j]), per_lookup, read<float>(grad), nullptr,
                    write<double>(out), grad.size(0), grad.size(1), grad.size(2), j > 0});
  });
  // One table after the other, so that all can use the same workspace.
  Tensor workspace = torch::stable::new_empty(grads[0], {most_pairs}, ScalarType::Double);
  for (BagSquaredNorms& job : jobs) {
    job.workspace = write<double>(workspace);
    check_launch(bag_squared_norms(job, call.stream()));
  }
  return out;
}

void foreach_scatter_add_(const Tensors& weights, const Tensors& rows, const Tensors& order, const Tensors& starts,
                          const Tensors& bag_of_lookup, const Tensors& grads, const Tensors& scales, double alpha,
                          const OptionalTensors& per_lookup_weights, double grid) {
  const Call call(first_of(weights, "weights"));
  check_scatter(call, weights, {rows, order, starts, bag_of_lookup}, grads, scales, per_lookup_weights, grid);
  std::vector<ScatterAdd> jobs;
  int64_t largest = 0;
  for_each_table(weights.size(), [&](size_t j) {
    const Tensor& weight = weights[j];
    const int64_t lookups = order[j].size(0);
    const float* per_lookup = read_per_lookup(call, per_lookup_weights[j], lookups);
    largest = std::max(largest, scatter_add_workspace(lookups, weight.size(1)));
    jobs.push_back({write<float>(weight), read<int64_t>(rows[j]), read<int64_t>(order[j]), read<int64_t>(starts[j]),
                    read<int64_t>(bag_of_lookup[j]), per_lookup, read<float>(grads[j]), read<float>(scales[j]), nullptr, alpha,
                    grid, weight.size(0), rows[j].size(0), lookups, grads[j].size(0), weight.size(1)});
  });
  // One table after the other, so that all can use the same workspace.
  Tensor workspace = torch::stable::new_empty(weights[0], {largest});
  for (ScatterAdd& job : jobs) {
    job.workspace = write<float>(workspace);
    check_launch(scatter_add(job, call.stream()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lazydp, CUDA, m) {
  m.impl("normal_", TORCH_BOX(&normal_));
  m.impl("flush_", TORCH_BOX(&flush_));
  m.impl("foreach_group_rows", TORCH_BOX(&foreach_group_rows));
  m.impl("foreach_catch_up_", TORCH_BOX(&foreach_catch_up_));
  m.impl("foreach_bag_sum", TORCH_BOX(&foreach_bag_sum));
  m.impl("foreach_catch_up_bag_sum_", TORCH_BOX(&foreach_catch_up_bag_sum_));
  m.impl("foreach_bag_sq_norms", TORCH_BOX(&foreach_bag_sq_norms));
  m.impl("foreach_scatter_add_", TORCH_BOX(&foreach_scatter_add_));
}

}  // namespace lazydp::cuda
