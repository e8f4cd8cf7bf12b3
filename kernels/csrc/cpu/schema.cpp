// The schemas of the operators, declared once for every device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lazydp, m) {
  m.def("normal_(Tensor(a!) out, Tensor key, int table, int first_row, int step) -> ()");
  m.def("group_rows(Tensor indices, int num_rows) -> (Tensor, Tensor, Tensor)");
  m.def(
      "catch_up_(Tensor(a!) weight, Tensor(b!) last, Tensor rows, Tensor key, int table, int step, Tensor transition, "
      "Tensor factor, Tensor(c!)? momentum, bool ones) -> ()");
  m.def(
      "flush_(Tensor(a!) weight, Tensor(b!) last, Tensor key, int table, int step, Tensor transition, Tensor factor, "
      "Tensor(c!)? momentum, bool ones) -> ()");
  m.def("bag_sum(Tensor weight, Tensor indices, Tensor offsets, Tensor? per_lookup_weights) -> Tensor");
  m.def(
      "catch_up_bag_sum_(Tensor(a!) weight, Tensor(b!) last, Tensor rows, Tensor order, Tensor starts, Tensor key, "
      "int table, int step, Tensor transition, Tensor factor, Tensor(c!)? momentum, bool ones, Tensor indices, "
      "Tensor offsets, Tensor bag_of_lookup, Tensor? per_lookup_weights) -> Tensor");
  m.def("bag_ids(Tensor offsets) -> Tensor");
  m.def("bag_sq_norms(Tensor indices, Tensor offsets, Tensor grad, Tensor? per_lookup_weights) -> Tensor");
  m.def(
      "scatter_add_(Tensor(a!) weight, Tensor rows, Tensor order, Tensor starts, Tensor bag_of_lookup, Tensor grad, "
      "Tensor scale, float alpha, Tensor? per_lookup_weights) -> ()");
  m.def("chacha20_blocks(Tensor inputs) -> Tensor");
  m.def("normals_of_blocks(Tensor words) -> Tensor");
  m.def("simd_level() -> int");
  m.def("best_simd_level() -> int");
  m.def("set_simd_level(int level) -> ()");
  m.def("chacha_words(Tensor key, int stream, int counter, int n) -> Tensor");
}
