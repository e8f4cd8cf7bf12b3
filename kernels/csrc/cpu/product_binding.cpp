// The operators of weighted products and sums: checks what came from Python, then hands raw pointers to the cores.
//
// Every check is made before anything is written. A failed one throws std::invalid_argument, ValueError in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/tensor_arguments.h"
#include "cpu/product_norms.h"
#include "cpu/torch_arguments.h"
#include "cpu/weighted_products.h"

namespace lazydp::cpu {
namespace {

void weighted_product_(const Tensor& out, const Tensor& grads, const Tensor& inputs, const Tensor& scale,
                       const std::optional<Tensor>& order, int64_t block, bool overwrite) {
  check(grads, "grads", ScalarType::Float, 2);
  check(inputs, "inputs", ScalarType::Float, 2);
  check(scale, "scale", ScalarType::Float, 1);
  check(out, "out", ScalarType::Double, 2);
  const int64_t units = grads.size(0);
  check_size(inputs, "inputs", 0, units, "units of grads");
  check_size(scale, "scale", 0, units, "units of grads");
  check_size(out, "out", 0, grads.size(1), "columns of grads");
  check_size(out, "out", 1, inputs.size(1), "columns of inputs");
  if (block < 1 || block > kMaxBlock) refuse("block: expected 1 <= block <= ", kMaxBlock, ", found ", block);
  Written written;
  written.add(out, "out");
  written.check_unread(grads, "grads");
  written.check_unread(inputs, "inputs");
  written.check_unread(scale, "scale");
  const int64_t* places = nullptr;
  if (order) {
    check(*order, "order", ScalarType::Long, 1);
    check_size(*order, "order", 0, units, "units of grads");
    places = read<int64_t>(*order);
    for (int64_t k = 0; k < units; ++k)
      if (places[k] < 0 || places[k] >= units)
        refuse("order[", k, "]: expected 0 <= unit < ", units, ", found ", places[k]);
    written.check_unread(*order, "order");
  }
  weighted_product({read<float>(grads), read<float>(inputs), read<float>(scale), places, units, grads.size(1), inputs.size(1),
                    block, write<double>(out), overwrite},
                   torch_threads());
}

void weighted_sum_(const Tensor& out, const Tensor& rows, const Tensor& weights) {
  check(rows, "rows", ScalarType::Float, 2);
  check(weights, "weights", ScalarType::Double, 1);
  check(out, "out", ScalarType::Double, 1);
  check_size(weights, "weights", 0, rows.size(0), "one for each row");
  check_size(out, "out", 0, rows.size(1), "columns of rows");
  Written written;
  written.add(out, "out");
  written.check_unread(rows, "rows");
  written.check_unread(weights, "weights");
  weighted_sum({read<float>(rows), read<double>(weights), rows.size(0), rows.size(1), write<double>(out)}, torch_threads());
}

constexpr int64_t kWeight = 1, kBias = 2;

Tensor foreach_product_sq_norms(const Tensors& inputs, const Tensors& grads, const std::vector<int64_t>& parameters) {
  const size_t layers = inputs.size();
  if (layers == 0 || grads.size() != layers || parameters.size() != layers)
    refuse("inputs, grads and parameters: expected one for each of one layer at least, found ", layers, ", ", grads.size(),
           " and ", parameters.size());
  check(inputs[0], "inputs", ScalarType::Float, 2);
  ProductNorms job{{}, inputs[0].size(0), nullptr};
  for (size_t j = 0; j < layers; ++j) {
    check(inputs[j], "inputs", ScalarType::Float, 2);
    check(grads[j], "grads", ScalarType::Float, 2);
    check_size(inputs[j], "inputs", 0, job.units, "units of the first layer");
    check_size(grads[j], "grads", 0, job.units, "units of the first layer");
    if (parameters[j] < 0 || parameters[j] > (kWeight | kBias))
      refuse("parameters[", j, "]: expected 0 <= parameters <= 3, found ", parameters[j]);
    job.layers.push_back({read<float>(inputs[j]), read<float>(grads[j]), inputs[j].size(1), grads[j].size(1),
                          (parameters[j] & kWeight) != 0, (parameters[j] & kBias) != 0});
  }
  Tensor out = torch::stable::new_empty(inputs[0], {job.units}, ScalarType::Double);
  job.out = write<double>(out);
  product_norms(job, torch_threads());
  return out;
}

void noised_sum_(const Tensor& out, const Tensor& sum, const std::optional<Tensor>& noise, double scale) {
  check(out, "out", ScalarType::Float, 1);
  check(sum, "sum", ScalarType::Double, 1);
  check_size(sum, "sum", 0, out.size(0), "elements of out");
  Written written;
  written.add(out, "out");
  written.check_unread(sum, "sum");
  if (noise) {
    check(*noise, "noise", ScalarType::Float, 1);
    check_size(*noise, "noise", 0, out.size(0), "elements of out");
    written.check_unread(*noise, "noise");
  }
  noised_sum({read<double>(sum), noise ? read<float>(*noise) : nullptr, scale, out.size(0), write<float>(out)},
             torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lazydp, CPU, m) {
  m.impl("weighted_product_", TORCH_BOX(&weighted_product_));
  m.impl("weighted_sum_", TORCH_BOX(&weighted_sum_));
  m.impl("foreach_product_sq_norms", TORCH_BOX(&foreach_product_sq_norms));
  m.impl("noised_sum_", TORCH_BOX(&noised_sum_));
}

}  // namespace lazydp::cpu
