// Texts as Arrow lays them out.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>

namespace lazydp::rows {

// n texts, one after the other, and where each begins: n + 1 ascending offsets within the bytes, which are checked.
class Texts {
 public:
  Texts(std::span<const uint8_t> bytes, std::span<const int32_t> offsets) : bytes_(bytes), narrow_(offsets.data()) { check(offsets); }
  Texts(std::span<const uint8_t> bytes, std::span<const int64_t> offsets) : bytes_(bytes), wide_(offsets.data()) { check(offsets); }

  size_t size() const { return size_; }
  std::span<const uint8_t> operator[](size_t row) const {
    const int64_t from = begin(row);
    return bytes_.subspan(static_cast<size_t>(from), static_cast<size_t>(begin(row + 1) - from));
  }

 private:
  template <class Offset>
  void check(std::span<const Offset> offsets) {
    if (offsets.empty()) throw std::invalid_argument("offsets: expected at least one");
    size_ = offsets.size() - 1;
    Offset before = offsets[0];
    bool ordered = before >= 0;
    for (const Offset next : offsets) {
      ordered &= next >= before;
      before = next;
    }
    if (!ordered || static_cast<uint64_t>(before) > bytes_.size())
      throw std::invalid_argument("offsets: expected ascending places within the data");
  }
  int64_t begin(size_t row) const { return wide_ != nullptr ? wide_[row] : narrow_[row]; }

  std::span<const uint8_t> bytes_;
  size_t size_ = 0;
  const int64_t* wide_ = nullptr;
  const int32_t* narrow_ = nullptr;
};

inline bool equal(std::span<const uint8_t> left, std::span<const uint8_t> right) {
  return left.size() == right.size() && (left.empty() || std::memcmp(left.data(), right.data(), left.size()) == 0);
}

}  // namespace lazydp::rows
