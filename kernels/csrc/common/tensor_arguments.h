// What the operators of both devices check and read of their arguments, for the binding files: the only other users of torch.
//
// A failed check throws std::invalid_argument, ValueError in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/chacha20.h"
#include "common/fill.h"

namespace lazydp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    default: return "another dtype";
  }
}

inline void check_layout(const Tensor& tensor, const char* name, ScalarType type, int64_t dims) {
  if (tensor.scalar_type() != type) refuse(name, ": expected ", name_of(type), ", found ", name_of(tensor.scalar_type()));
  if (tensor.dim() != dims) refuse(name, ": expected ", dims, " dimension(s), found ", tensor.dim());
  if (!tensor.is_contiguous()) refuse(name, ": expected a contiguous tensor; call .contiguous()");
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t size, const char* what) {
  if (tensor.size(dim) != size)
    refuse(name, ": expected size ", size, " in dimension ", dim, " (", what, "), found ", tensor.size(dim));
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// ---- lists: one entry for each of several tables ----

template <class List>
void check_count(const List& list, const char* name, size_t tables) {
  if (list.size() != tables) refuse(name, ": expected one for each of ", tables, " table(s), found ", list.size());
}

// Calls f(j) for each table j, one after the other. What it refuses is said of that table, where there are several.
template <class F>
void for_each_table(size_t tables, const F& f) {
  for (size_t j = 0; j < tables; ++j) {
    try {
      f(j);
    } catch (const std::invalid_argument& error) {
      if (tables == 1) throw;
      refuse("table ", j, " of ", tables, ": ", error.what());
    }
  }
}

inline const Tensor& first_of(const Tensors& tensors, const char* name) {
  if (tensors.empty()) refuse(name, ": expected one table at least, found none");
  return tensors.front();
}

// The memory that an operator writes to. Jobs on several tables run at the same time: what they write, nothing else may share.
class Written {
 public:
  void add(const Tensor& tensor, const char* name, size_t j = 0) {
    const Range range = range_of(tensor, name, j);
    if (range.begin < range.end) ranges_.push_back(range);
  }
  void add(const Tensors& tensors, const char* name) {
    for (size_t j = 0; j < tensors.size(); ++j) add(tensors[j], name, j);
  }

  // Once everything is added.
  void check_apart() {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < ranges_.size(); ++i)
      if (ranges_[i].begin < ranges_[i - 1].end) refuse_overlap(ranges_[i - 1], ranges_[i]);
  }

  // After check_apart: that nothing is read where something is written.
  void check_unread(const Tensor& tensor, const char* name, size_t j = 0) const {
    const Range read = range_of(tensor, name, j);
    const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), read.begin,
                                        [](const char* begin, const Range& range) { return begin < range.end; });
    if (read.begin < read.end && after != ranges_.end() && after->begin < read.end) refuse_overlap(read, *after);
  }
  void check_unread(const Tensors& tensors, const char* name) const {
    for (size_t j = 0; j < tensors.size(); ++j) check_unread(tensors[j], name, j);
  }
  void check_unread(const OptionalTensors& tensors, const char* name) const {
    for (size_t j = 0; j < tensors.size(); ++j)
      if (tensors[j]) check_unread(*tensors[j], name, j);
  }

 private:
  struct Range {
    const char* begin;
    const char* end;
    const char* name;
    size_t j;
  };

  static Range range_of(const Tensor& tensor, const char* name, size_t j) {
    const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
    // Of types that no operator takes the size does not matter: such a tensor is refused for its type.
    const auto type = tensor.scalar_type();
    const int64_t bytes = type == ScalarType::Long || type == ScalarType::Double ? 8 : 4;
    return {begin, begin + tensor.numel() * bytes, name, j};
  }

  [[noreturn]] static void refuse_overlap(const Range& one, const Range& other) {
    refuse(one.name, "[", one.j, "] and ", other.name, "[", other.j,
           "]: expected tensors without common memory, found an overlap");
  }

  std::vector<Range> ranges_;
};

inline void check_distinct(std::vector<int64_t> numbers, const char* name) {
  std::sort(numbers.begin(), numbers.end());
  const auto twice = std::adjacent_find(numbers.begin(), numbers.end());
  if (twice != numbers.end()) refuse(name, ": expected distinct numbers, found ", *twice, " twice");
}

// Always in host memory: a kernel on a device gets it as an argument, so that no copy lies in the device's heap.
inline Key read_key(const Tensor& tensor) {
  if (!tensor.is_cpu()) refuse("key: expected a CPU tensor, found one on another device");
  check_layout(tensor, "key", ScalarType::Byte, 1);
  check_size(tensor, "key", 0, 4 * kKeyWords, "bytes");
  const auto* bytes = read<uint8_t>(tensor);
  Key key;
  uint32_t any = 0;
  for (int i = 0; i < kKeyWords; ++i) {
    key.words[i] =
        bytes[4 * i] | bytes[4 * i + 1] << 8 | bytes[4 * i + 2] << 16 | static_cast<uint32_t>(bytes[4 * i + 3]) << 24;
    any |= key.words[i];
  }
  if (any == 0) refuse("key: all bytes are zero, as a destroyed key leaves them; noise under it could be predicted");
  return key;
}

// The number of row 0 of a shard that has `rows` rows.
inline int64_t checked_first_row(int64_t first_row, int64_t rows) {
  if (first_row < 0 || first_row > kMaxRows - rows)
    refuse("first_row: expected 0 <= first_row and first_row + rows <= 2^48, found ", first_row);
  return first_row;
}

inline uint32_t checked_table(int64_t table) {
  if (table < 0 || table >= kKeystreamTable) refuse("table: expected 0 <= table < ", kKeystreamTable, ", found ", table);
  return static_cast<uint32_t>(table);
}

inline int32_t checked_step(int64_t step) {
  if (step < 0 || step > std::numeric_limits<int32_t>::max()) refuse("step: expected 0 <= step < 2^31, found ", step);
  return static_cast<int32_t>(step);
}

// `check(tensor, name, type, dims)` is the device's own: where a tensor must live, and check_layout.

template <class Check>
Fill read_fill(const Check& check, const Tensor& out, const Tensor& key, int64_t table, int64_t first_row, int64_t step) {
  check(out, "out", ScalarType::Float, 2);
  return {write<float>(out),
          out.size(0),
          out.size(1),
          checked_first_row(first_row, out.size(0)),
          read_key(key),
          checked_table(table),
          static_cast<uint32_t>(checked_step(step))};
}

// The arguments of foreach_catch_up_ and of the operators that begin with it.
struct __attribute__((visibility("hidden"))) CatchUpTables {
  const Tensors& weights;
  const Tensors& last;
  const Tensor& key;
  const std::vector<int64_t>& tables;
  const std::vector<int64_t>& first_rows;
  int64_t step;
  const Tensor& transition;
  const Tensor& factor;
  const Tensors& momenta;
  bool ones;

  // Two jobs on one table would give its rows their noise twice; two tables of one number would get the same noise.
  Written check_lists(const Tensors& sums = {}) const {
    check_count(last, "last", weights.size());
    check_count(tables, "tables", weights.size());
    check_count(first_rows, "first_rows", weights.size());
    if (!momenta.empty()) check_count(momenta, "momenta", weights.size());
    check_distinct(tables, "tables");
    Written written;
    written.add(weights, "weights");
    written.add(last, "last");
    written.add(momenta, "momenta");
    written.add(sums, "sums");
    written.check_apart();
    written.check_unread(transition, "transition");
    written.check_unread(factor, "factor");
    return written;
  }

  std::optional<Tensor> momentum(size_t j) const { return momenta.empty() ? std::nullopt : std::optional(momenta[j]); }
};

template <class Check>
void check_catch_up(const Check& check, const Tensor& weight, const Tensor& last, const Tensor& transition,
                    const Tensor& factor, const std::optional<Tensor>& momentum) {
  check(weight, "weight", ScalarType::Float, 2);
  const int64_t num_rows = weight.size(0);
  if (num_rows > kMaxRows) refuse("weight: expected at most 2^48 rows, found ", num_rows);
  check(last, "last", ScalarType::Int, 1);
  check_size(last, "last", 0, num_rows, "rows of weight");
  check(transition, "transition", ScalarType::Float, 2);
  check(factor, "factor", ScalarType::Float, 2);
  check_size(transition, "transition", 1, momentum ? 4 : 1, momentum ? "m11 m12 m21 m22" : "m");
  check_size(factor, "factor", 0, transition.size(0), "starting steps of transition");
  check_size(factor, "factor", 1, momentum ? 3 : 1, momentum ? "l11 l21 l22" : "l");
  Written written;
  written.add(weight, "weight");
  written.add(last, "last");
  if (momentum) {
    check(*momentum, "momentum", ScalarType::Float, 2);
    check_size(*momentum, "momentum", 0, num_rows, "rows of weight");
    check_size(*momentum, "momentum", 1, weight.size(1), "columns of weight");
    written.add(*momentum, "momentum");
  }
  written.check_apart();
}

// The groups of several tables' lookups, and the bags that the lookups belong to.
struct __attribute__((visibility("hidden"))) GroupTables {
  const Tensors& rows;
  const Tensors& order;
  const Tensors& starts;
  const Tensors& bag_of_lookup;

  void check_unread(const Written& written) const {
    written.check_unread(rows, "rows");
    written.check_unread(order, "order");
    written.check_unread(starts, "starts");
    written.check_unread(bag_of_lookup, "bag_of_lookup");
  }

  template <class Check>
  void check_tensors(const Check& check, size_t tables) const {
    check_count(rows, "rows", tables);
    check_count(order, "order", tables);
    check_count(starts, "starts", tables);
    check_count(bag_of_lookup, "bag_of_lookup", tables);
    for_each_table(tables, [&](size_t j) {
      check(rows[j], "rows", ScalarType::Long, 1);
      check(order[j], "order", ScalarType::Long, 1);
      check(starts[j], "starts", ScalarType::Long, 1);
      check_size(starts[j], "starts", 0, rows[j].size(0) + 1, "rows + 1");
      check(bag_of_lookup[j], "bag_of_lookup", ScalarType::Long, 1);
      check_size(bag_of_lookup[j], "bag_of_lookup", 0, order[j].size(0), "lookups");
    });
  }
};

// What foreach_scatter_add_ is told.
template <class Check>
void check_scatter(const Check& check, const Tensors& weights, const GroupTables& groups, const Tensors& grads,
                   const Tensors& scales, const OptionalTensors& per_lookup_weights, double grid) {
  int exponent = 0;
  if (grid != 0.0 && std::frexp(grid, &exponent) != 0.5)
    refuse("grid: expected a power of two, or 0 for sums in float32, found ", grid);
  Written written;
  written.add(weights, "weights");
  written.check_apart();
  groups.check_unread(written);
  written.check_unread(grads, "grads");
  written.check_unread(scales, "scales");
  written.check_unread(per_lookup_weights, "per_lookup_weights");
  check_count(grads, "grads", weights.size());
  check_count(scales, "scales", weights.size());
  check_count(per_lookup_weights, "per_lookup_weights", weights.size());
  groups.check_tensors(check, weights.size());
  for_each_table(weights.size(), [&](size_t j) {
    check(weights[j], "weight", ScalarType::Float, 2);
    check(grads[j], "grad", ScalarType::Float, 2);
    check_size(grads[j], "grad", 1, weights[j].size(1), "columns of weight");
    check(scales[j], "scale", ScalarType::Float, 1);
    check_size(scales[j], "scale", 0, grads[j].size(0), "bags of grad");
  });
}

// The memory for sums of bags, [bags, columns].
template <class Check>
float* write_sums(const Check& check, const Tensor& sums, int64_t bags, int64_t columns) {
  check(sums, "sums", ScalarType::Float, 2);
  check_size(sums, "sums", 0, bags, "bags");
  check_size(sums, "sums", 1, columns, "columns of weight");
  return write<float>(sums);
}

template <class Check>
const float* read_per_lookup(const Check& check, const std::optional<Tensor>& weights, int64_t lookups) {
  if (!weights) return nullptr;
  check(*weights, "per_lookup_weights", ScalarType::Float, 1);
  check_size(*weights, "per_lookup_weights", 0, lookups, "one for each lookup");
  return read<float>(*weights);
}

}  // namespace lazydp
