// The schemas of the operators, declared once for every device. Those named foreach, as torch names its own, do one thing to
// several tables: the lists are as long as the list of tables. `momenta` may be empty instead. (Torch traces no operator that
// both writes to its arguments and returns a list: where one would, it writes to a list of results.)
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lazydp, m) {
  m.def("normal_(Tensor(a!) out, Tensor key, int table, int first_row, int step) -> ()");
  m.def("foreach_group_rows(Tensor[] indices, int[] num_rows) -> (Tensor[], Tensor[], Tensor[])");
  m.def("foreach_bag_ids(Tensor[] offsets) -> Tensor[]");
  m.def(
      "foreach_catch_up_(Tensor(a!)[] weights, Tensor(b!)[] last, Tensor[] rows, Tensor key, int[] tables, int[] first_rows, "
      "int step, Tensor transition, Tensor factor, Tensor(c!)[] momenta, bool ones) -> ()");
  m.def(
      "flush_(Tensor(a!) weight, Tensor(b!) last, Tensor key, int table, int first_row, int step, Tensor transition, "
      "Tensor factor, Tensor(c!)? momentum, bool ones) -> ()");
  m.def("foreach_bag_sum(Tensor[] weights, Tensor[] indices, Tensor[] offsets, Tensor?[] per_lookup_weights) -> Tensor[]");
  m.def(
      "foreach_catch_up_bag_sum_(Tensor(a!)[] weights, Tensor(b!)[] last, Tensor[] rows, Tensor[] order, Tensor[] starts, "
      "Tensor key, int[] tables, int[] first_rows, int step, Tensor transition, Tensor factor, Tensor(c!)[] momenta, bool "
      "ones, "
      "Tensor[] indices, Tensor[] offsets, Tensor[] bag_of_lookup, Tensor?[] per_lookup_weights, Tensor(d!)[] sums) -> ()");
  m.def("foreach_bag_sq_norms(Tensor[] indices, Tensor[] offsets, Tensor[] grads, Tensor?[] per_lookup_weights) -> Tensor");
  m.def(
      "foreach_scatter_add_(Tensor(a!)[] weights, Tensor[] rows, Tensor[] order, Tensor[] starts, Tensor[] bag_of_lookup, "
      "Tensor[] grads, Tensor[] scales, float alpha, Tensor?[] per_lookup_weights, float grid) -> ()");
  m.def(
      "weighted_product_(Tensor(a!) out, Tensor grads, Tensor inputs, Tensor scale, Tensor? order, int block, bool overwrite)"
      " -> ()");
  m.def("weighted_sum_(Tensor(a!) out, Tensor rows, Tensor weights) -> ()");
  m.def("foreach_product_sq_norms(Tensor[] inputs, Tensor[] grads, int[] parameters) -> Tensor");
  m.def("noised_sum_(Tensor(a!) out, Tensor sum, Tensor? noise, float scale) -> ()");
  m.def("chacha20_blocks(Tensor inputs) -> Tensor");
  m.def("normals_of_blocks(Tensor words) -> Tensor");
  m.def("simd_level() -> int");
  m.def("best_simd_level() -> int");
  m.def("set_simd_level(int level) -> ()");
  m.def("chacha_words(Tensor key, int stream, int counter, int n) -> Tensor");
}
