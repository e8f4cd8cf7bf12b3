// The CUDA operators under the schemas of cpu/schema.cpp: checks shapes, types and devices, finds the current stream, hands raw
// pointers to the launchers. What lies in device memory is not looked at here, for that would make the host wait: the
// kernels check it themselves (LAZYDP_REFUSE).
//
// Differences from the CPU operators, both for the same reason: group_rows returns lists as long as the lookups, padded
// as csrc/cuda/rows.h says; and an index out of range is an error of the device, reported by a later call.
//
// Workspaces come from torch's caching allocator: in stream order, and from the graph's own pool under capture (of the
// operators that draw no noise; those that do refuse it).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

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
      refuse("noise cannot be captured in a CUDA graph: every replay would draw that of the same step; capture the dense part only");
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

Wake read_wake(const Call& call, const Tensor& weight, const Tensor& last, const Tensor& key, int64_t table, int64_t step,
               const Tensor& transition, const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  call.refuse_capture();
  check_wake(call, weight, last, transition, factor, momentum);
  return {write<float>(weight), momentum ? write<float>(*momentum) : nullptr, write<int32_t>(last), nullptr, weight.size(0),
          weight.size(0), weight.size(1), read<float>(transition), read<float>(factor), transition.size(0), read_key(key),
          checked_table(table), checked_step(step), ones};
}

void choose_rows(const Call& call, const Tensor& rows, Wake& wake) {
  call(rows, "rows", ScalarType::Long, 1);
  wake.rows = read<int64_t>(rows);
  wake.count = rows.size(0);
}

BagSum read_bag_sum(const Call& call, const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                    const std::optional<Tensor>& per_lookup_weights, const Tensor& out) {
  return {read<float>(weight), read<int64_t>(indices), read<int64_t>(offsets),
          read_per_lookup(call, per_lookup_weights, indices.size(0)), write<float>(out), weight.size(0),
          offsets.size(0) - 1, weight.size(1)};
}

void normal_(const Tensor& out, const Tensor& key, int64_t table, int64_t first_row, int64_t step) {
  const Call call(out);
  call.refuse_capture();
  check_launch(fill_normals(read_fill(call, out, key, table, first_row, step), call.stream()));
}

std::tuple<Tensor, Tensor, Tensor> group_rows_op(const Tensor& indices, int64_t num_rows) {
  const Call call(indices);
  call(indices, "indices", ScalarType::Long, 1);
  const int64_t lookups = indices.size(0);
  size_t bytes = 0;
  check_launch(group_rows_workspace(lookups, num_rows, &bytes));
  Tensor rows = torch::stable::new_empty(indices, {lookups});
  Tensor order = torch::stable::new_empty(indices, {lookups});
  Tensor starts = torch::stable::new_empty(indices, {lookups + 1});
  Tensor workspace = torch::stable::new_empty(indices, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  check_launch(group_rows({read<int64_t>(indices), write<int64_t>(rows), write<int64_t>(order), write<int64_t>(starts),
                           write<uint8_t>(workspace), bytes, lookups, num_rows},
                          call.stream()));
  return {rows, order, starts};
}

void catch_up_(const Tensor& weight, const Tensor& last, const Tensor& rows, const Tensor& key, int64_t table, int64_t step,
               const Tensor& transition, const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  const Call call(weight);
  Wake wake = read_wake(call, weight, last, key, table, step, transition, factor, momentum, ones);
  choose_rows(call, rows, wake);
  check_launch(wake_rows(wake, call.stream()));
}

void flush_(const Tensor& weight, const Tensor& last, const Tensor& key, int64_t table, int64_t step, const Tensor& transition,
            const Tensor& factor, const std::optional<Tensor>& momentum, bool ones) {
  const Call call(weight);
  check_launch(wake_rows(read_wake(call, weight, last, key, table, step, transition, factor, momentum, ones), call.stream()));
}

Tensor bag_sum_op(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                  const std::optional<Tensor>& per_lookup_weights) {
  const Call call(weight);
  call(weight, "weight", ScalarType::Float, 2);
  call(indices, "indices", ScalarType::Long, 1);
  check_offsets(call, offsets);
  Tensor out = torch::stable::new_empty(weight, {offsets.size(0) - 1, weight.size(1)});
  check_launch(bag_sum(read_bag_sum(call, weight, indices, offsets, per_lookup_weights, out), call.stream()));
  return out;
}

Tensor catch_up_bag_sum_(const Tensor& weight, const Tensor& last, const Tensor& rows, const Tensor& order, const Tensor& starts,
                         const Tensor& key, int64_t table, int64_t step, const Tensor& transition, const Tensor& factor,
                         const std::optional<Tensor>& momentum, bool ones, const Tensor& indices, const Tensor& offsets,
                         const Tensor& bag_of_lookup, const std::optional<Tensor>& per_lookup_weights) {
  const Call call(weight);
  Wake wake = read_wake(call, weight, last, key, table, step, transition, factor, momentum, ones);
  choose_rows(call, rows, wake);
  call(indices, "indices", ScalarType::Long, 1);
  check_offsets(call, offsets);
  call(order, "order", ScalarType::Long, 1);
  check_size(order, "order", 0, indices.size(0), "lookups");
  call(starts, "starts", ScalarType::Long, 1);
  check_size(starts, "starts", 0, rows.size(0) + 1, "rows + 1");
  call(bag_of_lookup, "bag_of_lookup", ScalarType::Long, 1);
  check_size(bag_of_lookup, "bag_of_lookup", 0, indices.size(0), "lookups");
  Tensor out = torch::stable::new_empty(weight, {offsets.size(0) - 1, weight.size(1)});
  check_launch(wake_and_sum(wake, {read<int64_t>(order), read<int64_t>(starts), read<int64_t>(bag_of_lookup)},
                            read_bag_sum(call, weight, indices, offsets, per_lookup_weights, out), call.stream()));
  return out;
}

Tensor bag_sq_norms_op(const Tensor& indices, const Tensor& offsets, const Tensor& grad,
                       const std::optional<Tensor>& per_lookup_weights) {
  const Call call(grad);
  call(grad, "grad", ScalarType::Float, 3);
  call(indices, "indices", ScalarType::Long, 1);
  check_offsets(call, offsets);
  check_size(offsets, "offsets", 0, grad.size(0) * grad.size(1) + 1, "features * examples of grad + 1");
  Tensor out = torch::stable::new_empty(grad, {grad.size(1)});
  Tensor workspace =
      torch::stable::new_empty(grad, {bag_squared_norms_workspace(grad.size(0), grad.size(1))}, ScalarType::Double);
  check_launch(bag_squared_norms({read<int64_t>(indices), read<int64_t>(offsets),
                                  read_per_lookup(call, per_lookup_weights, indices.size(0)), read<float>(grad),
                                  write<double>(workspace), write<float>(out), grad.size(0), grad.size(1), grad.size(2)},
                                 call.stream()));
  return out;
}

void scatter_add_op(const Tensor& weight, const Tensor& rows, const Tensor& order, const Tensor& starts,
                    const Tensor& bag_of_lookup, const Tensor& grad, const Tensor& scale, double alpha,
                    const std::optional<Tensor>& per_lookup_weights) {
  const Call call(weight);
  call(weight, "weight", ScalarType::Float, 2);
  call(grad, "grad", ScalarType::Float, 2);
  check_size(grad, "grad", 1, weight.size(1), "columns of weight");
  call(scale, "scale", ScalarType::Float, 1);
  check_size(scale, "scale", 0, grad.size(0), "bags of grad");
  call(rows, "rows", ScalarType::Long, 1);
  call(order, "order", ScalarType::Long, 1);
  call(starts, "starts", ScalarType::Long, 1);
  check_size(starts, "starts", 0, rows.size(0) + 1, "rows + 1");
  call(bag_of_lookup, "bag_of_lookup", ScalarType::Long, 1);
  const int64_t lookups = order.size(0);
  check_size(bag_of_lookup, "bag_of_lookup", 0, lookups, "lookups");
  Tensor workspace = torch::stable::new_empty(weight, {scatter_add_workspace(lookups, weight.size(1))});
  check_launch(scatter_add({write<float>(weight), read<int64_t>(rows), read<int64_t>(order), read<int64_t>(starts),
                            read<int64_t>(bag_of_lookup), read_per_lookup(call, per_lookup_weights, lookups), read<float>(grad),
                            read<float>(scale), write<float>(workspace), static_cast<float>(alpha), weight.size(0),
                            rows.size(0), lookups, grad.size(0), weight.size(1)},
                           call.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lazydp, CUDA, m) {
  m.impl("normal_", TORCH_BOX(&normal_));
  m.impl("group_rows", TORCH_BOX(&group_rows_op));
  m.impl("catch_up_", TORCH_BOX(&catch_up_));
  m.impl("flush_", TORCH_BOX(&flush_));
  m.impl("bag_sum", TORCH_BOX(&bag_sum_op));
  m.impl("catch_up_bag_sum_", TORCH_BOX(&catch_up_bag_sum_));
  m.impl("bag_sq_norms", TORCH_BOX(&bag_sq_norms_op));
  m.impl("scatter_add_", TORCH_BOX(&scatter_add_op));
}

}  // namespace lazydp::cuda
