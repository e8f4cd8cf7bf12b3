// The extension `lazydp.kernels._rows`: functions on buffers, without torch, since reading a log has no use for it.
//
// Every function writes into buffers that its caller made, and lets other threads of Python run meanwhile. `kernels/rows.py`
// says what each computes.
#include "rows/buffers.h"
#include "rows/hashes.h"
#include "rows/order.h"
#include "rows/texts.h"

namespace lazydp::rows {
namespace {

template <class F>
PyObject* guarded(const F& body) {
  try {
    return body();
  } catch (const Buffer::PythonError&) {
    return nullptr;
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* hash_texts(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *data, *offsets, *out;
    if (!PyArg_ParseTuple(arguments, "OOO", &data, &offsets, &out)) return nullptr;
    const Buffer bytes(data, "data"), places(offsets, "offsets"), hashes(out, "out", true);
    {
      const WithoutLock unlocked;
      const Texts texts(bytes, places);
      const auto written = hashes.as<uint64_t>(texts.size());
      for (size_t row = 0; row < texts.size(); ++row) written[row] = hash_text(texts[row]);
    }
    return none();
  });
}

PyObject* hash_decimals(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *values, *out;
    if (!PyArg_ParseTuple(arguments, "OO", &values, &out)) return nullptr;
    const Buffer numbers(values, "values"), hashes(out, "out", true);
    {
      const WithoutLock unlocked;
      const auto read = numbers.as<const int64_t>();
      const auto written = hashes.as<uint64_t>(read.size());
      for (size_t row = 0; row < read.size(); ++row) written[row] = hash_decimal(read[row]);
    }
    return none();
  });
}

template <class Number, class Word>
void chain_in(std::span<uint64_t> hashes, const Buffer& values, bool without_zeros) {
  const auto numbers = values.as<const Number>(hashes.size());
  for (size_t row = 0; row < hashes.size(); ++row) {
    const uint64_t word = word_of(static_cast<Word>(numbers[row]));
    if (!without_zeros || word != 0) hashes[row] = chain(hashes[row], word);
  }
}

void chain_any(std::span<uint64_t> hashes, const Buffer& values, bool without_zeros) {
  const char kind = values.kind();
  if (kind == 'f') return chain_in<float, double>(hashes, values, without_zeros);
  if (kind == 'd') return chain_in<double, double>(hashes, values, without_zeros);
  const bool with_sign = kind == 'b' || kind == 'h' || kind == 'i' || kind == 'l' || kind == 'q';
  if (values.width() == 8) return chain_in<int64_t, int64_t>(hashes, values, without_zeros);
  if (values.width() == 4 && with_sign) return chain_in<int32_t, int64_t>(hashes, values, without_zeros);
  if (values.width() == 1 && !with_sign) return chain_in<uint8_t, int64_t>(hashes, values, without_zeros);
  throw std::invalid_argument("values: expected float32, float64, int32, int64, uint64, uint8 or bool");
}

PyObject* chain_values(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *hashes, *values;
    int without_zeros;
    if (!PyArg_ParseTuple(arguments, "OOp", &hashes, &values, &without_zeros)) return nullptr;
    const Buffer changed(hashes, "hashes", true), numbers(values, "values");
    {
      const WithoutLock unlocked;
      chain_any(changed.as<uint64_t>(), numbers, without_zeros != 0);
    }
    return none();
  });
}

PyObject* sums(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject* words;
    if (!PyArg_ParseTuple(arguments, "O", &words)) return nullptr;
    const Buffer read(words, "words");
    uint64_t first = 0, second = 0;
    {
      const WithoutLock unlocked;
      for (const uint64_t word : read.as<const uint64_t>()) {
        first += mix(word);
        second += mix(word ^ 1);
      }
    }
    return Py_BuildValue("KK", static_cast<unsigned long long>(first), static_cast<unsigned long long>(second));
  });
}

PyObject* hashed_codes_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *key, *person, *data, *offsets, *out;
    unsigned long long buckets;
    if (!PyArg_ParseTuple(arguments, "OOKOOO", &key, &person, &buckets, &data, &offsets, &out)) return nullptr;
    if (buckets == 0) throw std::invalid_argument("buckets: expected at least 1, found 0");
    const Buffer secret(key, "key"), purpose(person, "person"), bytes(data, "data"), places(offsets, "offsets");
    const Buffer codes(out, "out", true);
    {
      const WithoutLock unlocked;
      const Texts texts(bytes, places);
      hashed_codes(KeyedBlake2b(secret.as<const uint8_t>(), purpose.as<const uint8_t>()), buckets, texts,
                   codes.as<int64_t>(texts.size()));
    }
    return none();
  });
}

PyObject* fill_slots_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *data, *offsets, *out;
    if (!PyArg_ParseTuple(arguments, "OOO", &data, &offsets, &out)) return nullptr;
    const Buffer bytes(data, "data"), places(offsets, "offsets"), slots(out, "slots", true);
    {
      const WithoutLock unlocked;
      fill_slots(Texts(bytes, places), slots.as<uint32_t>());
    }
    return none();
  });
}

PyObject* find_texts_in(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *known_data, *known_offsets, *slots, *data, *offsets, *out;
    if (!PyArg_ParseTuple(arguments, "OOOOOO", &known_data, &known_offsets, &slots, &data, &offsets, &out)) return nullptr;
    const Buffer known_bytes(known_data, "known data"), known_places(known_offsets, "known offsets"), table(slots, "slots");
    const Buffer bytes(data, "data"), places(offsets, "offsets"), codes(out, "out", true);
    {
      const WithoutLock unlocked;
      const Texts texts(bytes, places);
      find_texts(Texts(known_bytes, known_places), table.as<const uint32_t>(), texts, codes.as<int64_t>(texts.size()));
    }
    return none();
  });
}

PyObject* order_by_part_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *hashes, *ends, *order;
    if (!PyArg_ParseTuple(arguments, "OOO", &hashes, &ends, &order)) return nullptr;
    const Buffer words(hashes, "hashes"), found_ends(ends, "ends", true), found(order, "order", true);
    {
      const WithoutLock unlocked;
      const auto read = words.as<const uint64_t>();
      const auto parts = found_ends.as<int64_t>();
      if (parts.empty() || parts.size() >> 32 != 0) throw std::invalid_argument("ends: expected 1 to 2^32 - 1 parts");
      order_by_part(read, parts, found.as<int64_t>(read.size()));
    }
    return none();
  });
}

PyObject* order_rows(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *group, *time, *part, *content, *data, *offsets, *order, *starts;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOO", &group, &time, &part, &content, &data, &offsets, &order, &starts)) return nullptr;
    const Buffer groups(group, "group"), times(time, "time"), parts(part, "part"), contents(content, "content");
    const Buffer bytes(data, "data"), places(offsets, "offsets"), found(order, "order", true), firsts(starts, "starts", true);
    {
      const WithoutLock unlocked;
      const auto grouped = groups.as<const uint64_t>();
      const size_t size = grouped.size();
      const Keys keys{grouped, times.held() ? times.as<const int64_t>(size) : std::span<const int64_t>(),
                      parts.held() ? parts.as<const double>(size) : std::span<const double>(),
                      contents.held() ? contents.as<const uint64_t>(size) : std::span<const uint64_t>()};
      RowOrder rows(keys);
      const auto ordered = found.as<int64_t>(size);
      if (places.held()) {
        const Texts users(bytes, places);
        if (users.size() != size) throw std::invalid_argument("users: expected as many as rows");
        const auto marks = firsts.as<uint8_t>(size);
        rows.sort(ordered);
        rows.mark_users(users, ordered, marks);
      } else {
        rows.sort(ordered);
      }
    }
    return none();
  });
}

PyMethodDef methods[] = {{"hash_texts", hash_texts, METH_VARARGS, nullptr},
                         {"hash_decimals", hash_decimals, METH_VARARGS, nullptr},
                         {"chain", chain_values, METH_VARARGS, nullptr},
                         {"sums", sums, METH_VARARGS, nullptr},
                         {"hashed_codes", hashed_codes_of, METH_VARARGS, nullptr},
                         {"fill_slots", fill_slots_of, METH_VARARGS, nullptr},
                         {"find_texts", find_texts_in, METH_VARARGS, nullptr},
                         {"order_by_part", order_by_part_of, METH_VARARGS, nullptr},
                         {"order_rows", order_rows, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_rows", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace lazydp::rows

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__rows() { return PyModuleDef_Init(&lazydp::rows::definition); }
