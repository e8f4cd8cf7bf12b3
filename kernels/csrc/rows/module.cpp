// The extension `lazydp.kernels._rows`: functions on buffers, without torch, since reading a log has no use for it.
//
// Every function writes into buffers that its caller made, and lets other threads of Python run meanwhile. `kernels/rows.py`
// says what each computes.
#include "rows/best.h"
#include "rows/buffers.h"
#include "rows/codes.h"
#include "rows/hashes.h"
#include "rows/look_up.h"
#include "rows/numbers.h"
#include "rows/order.h"
#include "rows/splits.h"
#include "rows/users.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

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
      const Texts texts = texts_of(bytes, places);
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
      hash_decimals_of(read, hashes.as<uint64_t>(read.size()));
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
    const char* level;
    unsigned long long buckets;
    if (!PyArg_ParseTuple(arguments, "OOKOOOs", &key, &person, &buckets, &data, &offsets, &out, &level)) return nullptr;
    const blake2b::Lanes lanes = *level == 0 ? blake2b::best_lanes() : blake2b::lanes_named(level);
    if (lanes.count == 0) throw std::invalid_argument("level: expected portable, avx2 or avx512, as this machine runs it");
    if (buckets == 0) throw std::invalid_argument("buckets: expected at least 1, found 0");
    const Buffer secret(key, "key"), purpose(person, "person"), bytes(data, "data"), places(offsets, "offsets");
    const Buffer codes(out, "out", true);
    {
      const WithoutLock unlocked;
      const Texts texts = texts_of(bytes, places);
      hashed_codes(KeyedBlake2b(secret.as<const uint8_t>(), purpose.as<const uint8_t>(), lanes), buckets, texts,
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
      fill_slots(texts_of(bytes, places), slots.as<uint32_t>());
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
      const Texts texts = texts_of(bytes, places);
      find_texts(texts_of(known_bytes, known_places), table.as<const uint32_t>(), texts, codes.as<int64_t>(texts.size()));
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
    PyObject *group, *time, *part, *content, *order;
    if (!PyArg_ParseTuple(arguments, "OOOOO", &group, &time, &part, &content, &order)) return nullptr;
    const Buffer groups(group, "group"), times(time, "time"), parts(part, "part"), contents(content, "content");
    const Buffer found(order, "order", true);
    {
      const WithoutLock unlocked;
      const auto grouped = groups.as<const uint64_t>();
      const size_t size = grouped.size();
      const Keys keys{grouped, times.held() ? times.as<const int64_t>(size) : std::span<const int64_t>(),
                      parts.held() ? parts.as<const double>(size) : std::span<const double>(),
                      contents.held() ? contents.as<const uint64_t>(size) : std::span<const uint64_t>()};
      RowOrder(keys).sort(found.as<int64_t>(size));
    }
    return none();
  });
}

PyObject* number_users_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *hashes, *data, *offsets, *out, *first;
    if (!PyArg_ParseTuple(arguments, "OOOOO", &hashes, &data, &offsets, &out, &first)) return nullptr;
    const Buffer words(hashes, "hashes"), bytes(data, "data"), places(offsets, "offsets"), numbers(out, "numbers", true);
    const Buffer firsts(first, "firsts", true);
    size_t users = 0;
    {
      const WithoutLock unlocked;
      const Texts texts = texts_of(bytes, places);
      UserNumbers numbered(words.as<const uint64_t>(), texts);
      users = numbered.fill(numbers.as<uint32_t>(texts.size()), firsts.as<uint32_t>(texts.size()));
    }
    return PyLong_FromSize_t(users);
  });
}

PyObject* sums_of_pairs(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *entries, *firsts, *seconds;
    if (!PyArg_ParseTuple(arguments, "OOO", &entries, &firsts, &seconds)) return nullptr;
    const Buffer numbers(entries, "entries"), words(firsts, "firsts"), others(seconds, "seconds");
    uint64_t first = 0, second = 0;
    {
      const WithoutLock unlocked;
      const NamedRows rows{numbers.as<const int32_t>(), {}, words.as<const uint64_t>()};
      const auto chained = others.held() ? others.as<const uint64_t>(rows.entries.size()) : std::span<const uint64_t>();
      for (size_t row = 0; row < rows.entries.size(); ++row) {
        uint64_t word = rows.hashes[rows.user(row)];
        if (!chained.empty()) word = chain(word, chained[row]);
        first += mix(word);
        second += mix(word ^ 1);
      }
    }
    return Py_BuildValue("KK", static_cast<unsigned long long>(first), static_cast<unsigned long long>(second));
  });
}

PyObject* part_by_user_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *entries, *accepted, *hashes, *ends, *user_ends, *rows, *local, *users;
    if (!PyArg_ParseTuple(arguments, "OOOOOOOO", &entries, &accepted, &hashes, &ends, &user_ends, &rows, &local, &users))
      return nullptr;
    const Buffer numbers(entries, "entries"), mask(accepted, "accepted"), words(hashes, "hashes");
    const Buffer row_ends(ends, "ends", true), ends_of_users(user_ends, "user ends", true), found(rows, "rows", true);
    const Buffer local_users(local, "local", true), used(users, "users", true);
    {
      const WithoutLock unlocked;
      const auto named = numbers.as<const int32_t>();
      const size_t size = named.size();
      const NamedRows batch{named, mask.held() ? mask.as<const uint8_t>(size) : std::span<const uint8_t>(),
                            words.as<const uint64_t>()};
      const auto parts = row_ends.as<int64_t>();
      if (parts.empty() || parts.size() >> 32 != 0) throw std::invalid_argument("ends: expected 1 to 2^32 - 1 parts");
      if (size >> 31 != 0) throw std::invalid_argument("entries: expected fewer than 2^31");
      part_by_user(batch, {parts, ends_of_users.as<int64_t>(parts.size()), found.as<uint32_t>(size),
                           local_users.as<uint32_t>(size), used.as<uint32_t>(batch.hashes.size())});
    }
    return none();
  });
}

PyObject* order_by_time_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *users, *time, *ends, *order, *ties;
    if (!PyArg_ParseTuple(arguments, "OOOOO", &users, &time, &ends, &order, &ties)) return nullptr;
    const Buffer numbers(users, "users"), times(time, "time"), found_ends(ends, "ends", true), found(order, "order", true);
    const Buffer marks(ties, "ties", true);
    {
      const WithoutLock unlocked;
      const auto numbered = numbers.as<const uint32_t>();
      const size_t size = numbered.size();
      if (size >> 32 != 0) throw std::invalid_argument("expected fewer than 2^32 rows");
      UserOrder(times.held() ? times.as<const int64_t>(size) : std::span<const int64_t>())
          .sort(numbered, found_ends.as<int64_t>(), found.as<uint32_t>(size), marks.as<uint8_t>(size));
    }
    return none();
  });
}

// The masks that `count_examples` and `fill_examples` of Python pass, and the buffers that hold them.
struct HeldRows {
  HeldRows(PyObject* order, PyObject* ends, PyObject* test, PyObject* within, PyObject* positive)
      : order_(order, "order"), ends_(ends, "ends"), test_(test, "test"), within_(within, "within"),
        positive_(positive, "positive") {}

  OrderedRows rows(uint64_t bound) const {
    const auto order = order_.as<const uint32_t>();
    const auto mask = [&order](const Buffer& held) {
      return held.held() ? held.as<const uint8_t>(order.size()) : std::span<const uint8_t>();
    };
    return {order, ends_.as<const int64_t>(), mask(test_), mask(within_), mask(positive_), bound};
  }

 private:
  Buffer order_, ends_, test_, within_, positive_;
};

PyObject* count_examples_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *order, *ends, *test, *within, *positive, *train_counts, *test_counts, *item_counts;
    unsigned long long bound;
    if (!PyArg_ParseTuple(arguments, "OOOOOKOOO", &order, &ends, &test, &within, &positive, &bound, &train_counts, &test_counts,
                          &item_counts))
      return nullptr;
    const HeldRows held(order, ends, test, within, positive);
    const Buffer trained(train_counts, "train", true), tested(test_counts, "test", true), taken(item_counts, "items", true);
    {
      const WithoutLock unlocked;
      const OrderedRows rows = held.rows(bound);
      const size_t users = rows.ends.size();
      count_examples(rows, {trained.as<int64_t>(users), tested.as<int64_t>(users), taken.as<int64_t>(users)});
    }
    return none();
  });
}

// The four arrays of the examples of a split, as a tuple.
struct HeldExamples {
  explicit HeldExamples(PyObject* arrays)
      : rows_(PyTuple_GetItem(arrays, 0), "rows", true), users_(PyTuple_GetItem(arrays, 1), "users", true),
        ends_(PyTuple_GetItem(arrays, 2), "ends", true), lengths_(PyTuple_GetItem(arrays, 3), "lengths", true) {}

  Examples examples() const {
    const auto rows = rows_.as<uint32_t>();
    return {rows, users_.as<int64_t>(rows.size()), ends_.as<int64_t>(rows.size()), lengths_.as<int32_t>(rows.size())};
  }

 private:
  Buffer rows_, users_, ends_, lengths_;
};

PyObject* fill_examples_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *order, *ends, *test, *within, *positive, *train_counts, *train_arrays, *test_arrays, *item_rows;
    unsigned long long most_history;
    if (!PyArg_ParseTuple(arguments, "OOOOOOKO!O!O", &order, &ends, &test, &within, &positive, &train_counts, &most_history,
                          &PyTuple_Type, &train_arrays, &PyTuple_Type, &test_arrays, &item_rows))
      return nullptr;
    if (PyTuple_Size(train_arrays) != 4 || PyTuple_Size(test_arrays) != 4)
      throw std::invalid_argument("examples: expected four arrays");
    const HeldRows held(order, ends, test, within, positive);
    const Buffer counts(train_counts, "counts"), taken(item_rows, "items", true);
    const HeldExamples trained(train_arrays), tested(test_arrays);
    {
      const WithoutLock unlocked;
      const OrderedRows rows = held.rows(0);
      Examples train = trained.examples(), test_examples = tested.examples();
      fill_examples(rows, counts.as<const int64_t>(rows.ends.size()), most_history, train, test_examples, taken.as<uint32_t>());
    }
    return none();
  });
}

template <class Value>
void gather_values(const Buffer& values, std::span<const uint32_t> rows, const Buffer& out, size_t width, size_t column) {
  const auto read = values.as<const Value>();
  const auto written = out.as<Value>(rows.size() * width);
  if (column >= width) throw std::invalid_argument("column: expected less than the width");
  size_t place = column;
  for (const uint32_t row : rows) {
    if (row >= read.size()) throw std::invalid_argument("rows: expected places of values");
    written[place] = read[row];
    place += width;
  }
}

PyObject* gather_of(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *values, *rows, *out;
    unsigned long long width, column;
    if (!PyArg_ParseTuple(arguments, "OOOKK", &values, &rows, &out, &width, &column)) return nullptr;
    const Buffer read(values, "values"), places(rows, "rows"), written(out, "out", true);
    {
      const WithoutLock unlocked;
      const auto picked = places.as<const uint32_t>();
      switch (read.width()) {
        case 1: gather_values<uint8_t>(read, picked, written, width, column); break;
        case 4: gather_values<uint32_t>(read, picked, written, width, column); break;
        case 8: gather_values<uint64_t>(read, picked, written, width, column); break;
        default: throw std::invalid_argument("values: expected entries of 1, 4 or 8 bytes");
      }
    }
    return none();
  });
}

// Calls body with the integers of a buffer, of 32 or 64 bits.
template <class Body>
void with_integers(const Buffer& values, const Buffer& valid, unsigned long long offset, const Body& body) {
  const auto bits = valid.held() ? valid.as<const uint8_t>() : std::span<const uint8_t>();
  if (values.width() == 4)
    body(Integers<int32_t>{values.as<const int32_t>(), bits, offset});
  else
    body(Integers<int64_t>{values.as<const int64_t>(), bits, offset});
}

PyObject* range_of_integers(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *values, *valid;
    unsigned long long offset;
    if (!PyArg_ParseTuple(arguments, "OOK", &values, &valid, &offset)) return nullptr;
    const Buffer numbers(values, "values"), bits(valid, "valid");
    std::pair<int64_t, int64_t> found;
    {
      const WithoutLock unlocked;
      with_integers(numbers, bits, offset, [&](const auto& integers) { found = range_of(integers); });
    }
    return Py_BuildValue("LL", static_cast<long long>(found.first), static_cast<long long>(found.second));
  });
}

PyObject* look_up_integers(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *values, *valid, *table, *out;
    unsigned long long offset;
    long long first;
    if (!PyArg_ParseTuple(arguments, "OOKLOO", &values, &valid, &offset, &first, &table, &out)) return nullptr;
    const Buffer numbers(values, "values"), bits(valid, "valid"), entries(table, "table"), written(out, "out", true);
    {
      const WithoutLock unlocked;
      with_integers(numbers, bits, offset, [&](const auto& integers) {
        look_up(integers, first, entries.as<const float>(), written.as<float>(integers.values.size()));
      });
    }
    return none();
  });
}

PyObject* best_of_rows_in(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *scores, *out, *counts;
    if (!PyArg_ParseTuple(arguments, "OOO", &scores, &out, &counts)) return nullptr;
    const Buffer read(scores, "scores"), indices(out, "out", true), found(counts, "counts", true);
    {
      const WithoutLock unlocked;
      best_of_rows(read.as<const float>(), indices.as<int64_t>(), found.as<int64_t>());
    }
    return none();
  });
}

PyObject* return_memory_at_once(PyObject*, PyObject*) {
#if defined(__GLIBC__)
  // Larger blocks are mapped by themselves, and unmapped when they are freed; few threads have a heap of their own.
  mallopt(M_MMAP_THRESHOLD, 1 << 18);
  mallopt(M_TRIM_THRESHOLD, 1 << 20);
  mallopt(M_ARENA_MAX, 2);
#endif
  return none();
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
                         {"number_users", number_users_of, METH_VARARGS, nullptr},
                         {"sums_of_pairs", sums_of_pairs, METH_VARARGS, nullptr},
                         {"part_by_user", part_by_user_of, METH_VARARGS, nullptr},
                         {"order_by_time", order_by_time_of, METH_VARARGS, nullptr},
                         {"count_examples", count_examples_of, METH_VARARGS, nullptr},
                         {"fill_examples", fill_examples_of, METH_VARARGS, nullptr},
                         {"gather", gather_of, METH_VARARGS, nullptr},
                         {"range_of_integers", range_of_integers, METH_VARARGS, nullptr},
                         {"look_up", look_up_integers, METH_VARARGS, nullptr},
                         {"best_of_rows", best_of_rows_in, METH_VARARGS, nullptr},
                         {"return_memory_at_once", return_memory_at_once, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_rows", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace lazydp::rows

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__rows() { return PyModuleDef_Init(&lazydp::rows::definition); }
