// What the operators of both devices check and read of their arguments, for the binding files: the only other users of torch.
//
// A failed check throws std::invalid_argument, ValueError in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "common/chacha20.h"
#include "common/fill.h"

namespace lazydp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
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

// Always in host memory: a kernel on a device gets it as an argument, so that no copy lies in the device's heap.
inline Key read_key(const Tensor& tensor) {
  if (!tensor.is_cpu()) refuse("key: expected a CPU tensor, found one on another device");
  check_layout(tensor, "key", ScalarType::Byte, 1);
  check_size(tensor, "key", 0, 4 * kKeyWords, "bytes");
  const auto* bytes = read<uint8_t>(tensor);
  Key key;
  uint32_t any = 0;
  for (int i = 0; i < kKeyWords; ++i) {
    key.words[i] = bytes[4 * i] | bytes[4 * i + 1] << 8 | bytes[4 * i + 2] << 16 | static_cast<uint32_t>(bytes[4 * i + 3]) << 24;
    any |= key.words[i];
  }
  if (any == 0) refuse("key: all bytes are zero, as a destroyed key leaves them; noise under it could be predicted");
  return key;
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
  if (first_row < 0 || first_row > kMaxRows - out.size(0))
    refuse("first_row: expected 0 <= first_row and first_row + rows <= 2^48, found ", first_row);
  return {write<float>(out), out.size(0), out.size(1), first_row, read_key(key), checked_table(table),
          static_cast<uint32_t>(checked_step(step))};
}

template <class Check>
void check_wake(const Check& check, const Tensor& weight, const Tensor& last, const Tensor& transition, const Tensor& factor,
                const std::optional<Tensor>& momentum) {
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
  if (!momentum) return;
  check(*momentum, "momentum", ScalarType::Float, 2);
  check_size(*momentum, "momentum", 0, num_rows, "rows of weight");
  check_size(*momentum, "momentum", 1, weight.size(1), "columns of weight");
}

template <class Check>
const float* read_per_lookup(const Check& check, const std::optional<Tensor>& weights, int64_t lookups) {
  if (!weights) return nullptr;
  check(*weights, "per_lookup_weights", ScalarType::Float, 1);
  check_size(*weights, "per_lookup_weights", 0, lookups, "one for each lookup");
  return read<float>(*weights);
}

}  // namespace lazydp
