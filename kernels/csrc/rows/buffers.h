// Python's buffers as spans, checked: what a function reads and writes is contiguous, of the width it expects, of one length.
#pragma once

#define PY_SSIZE_T_CLEAN
// Buffers are part of the stable interface since 3.11; the build of torch's extensions states an earlier one.
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <span>
#include <stdexcept>
#include <string>

#include "rows/texts.h"

namespace lazydp::rows {

// A contiguous buffer, let go of when it goes out of scope; holds nothing where the object is None.
class Buffer {
 public:
  Buffer(PyObject* object, const char* name, bool writable = false) : name_(name) {
    if (object == Py_None) return;
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, &view_, flags) != 0) throw PythonError();
    held_ = true;
  }
  ~Buffer() {
    if (held_) PyBuffer_Release(&view_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // An error that Python knows of already.
  struct PythonError : std::exception {};

  bool held() const { return held_; }
  size_t width() const { return static_cast<size_t>(view_.itemsize); }
  size_t size() const { return held_ ? static_cast<size_t>(view_.len) / width() : 0; }
  const void* data() const { return view_.buf; }
  // The last letter of the format: what the numbers are (the first may say the order of bytes).
  char kind() const { return view_.format == nullptr ? 'B' : view_.format[std::strlen(view_.format) - 1]; }

  template <class T>
  std::span<T> as() const {
    if (held_ && width() != sizeof(T))
      throw std::invalid_argument(std::string(name_) + ": expected entries of " + std::to_string(sizeof(T)) +
                                  " bytes, found " + std::to_string(width()));
    return {static_cast<T*>(held_ ? view_.buf : nullptr), size()};
  }

  template <class T>
  std::span<T> as(size_t expected) const {
    const auto found = as<T>();
    if (found.size() != expected)
      throw std::invalid_argument(std::string(name_) + ": expected " + std::to_string(expected) + " entries, found " +
                                  std::to_string(found.size()));
    return found;
  }

 private:
  const char* name_;
  Py_buffer view_{};
  bool held_ = false;
};

// n texts and where each begins: offsets of 32 or 64 bits.
inline Texts texts_of(const Buffer& data, const Buffer& offsets) {
  const auto bytes = data.held() ? data.as<const uint8_t>() : std::span<const uint8_t>();
  if (offsets.held() && offsets.width() == 8) return Texts(bytes, offsets.as<const int64_t>());
  return Texts(bytes, offsets.as<const int32_t>());
}

// Lets other threads of Python run while a function works on buffers.
class WithoutLock {
 public:
  WithoutLock() : state_(PyEval_SaveThread()) {}
  ~WithoutLock() { PyEval_RestoreThread(state_); }
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace lazydp::rows
