// The cores of the CPU kernels without Python and torch, to be run under sanitizers (sanitize.sh).
//
// Every buffer is allocated at exactly its size, so that AddressSanitizer sees one element too many; threads are plain
// std::thread, so that ThreadSanitizer sees every race.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "common/gaussian.h"
#include "common/skip_ahead.h"
#include "cpu/bags.h"
#include "cpu/catch_up_bag_sum.h"
#include "cpu/noise.h"
#include "cpu/simd_level.h"

namespace {

using namespace lazydp;
using namespace lazydp::cpu;

int failures = 0;

#define EXPECT(condition)                                                        \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                                \
    }                                                                            \
  } while (false)

Parallel threads(int count) {
  static thread_local int wanted;
  wanted = count;
  const auto run = [](int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
    const int64_t chunk = (end - begin + wanted - 1) / wanted;
    std::vector<std::thread> pool;
    for (int64_t from = begin; from < end; from += chunk)
      pool.emplace_back([=] { body(from, std::min(from + chunk, end), context); });
    for (std::thread& thread : pool) thread.join();
  };
  return {run, count};
}

const char* name_of(SimdLevel level) {
  constexpr const char* names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(level)];
}

void for_each_level(const std::function<void()>& test) {
  for (const SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (set_simd_level(level)) test();
  }
}

Key key_of(uint32_t seed) {
  std::mt19937 random(seed);
  Key key;
  for (uint32_t& word : key.words) word = random();
  return key;
}

// RFC 8439, section 2.3.2.
void test_chacha20() {
  Key key;
  for (uint32_t i = 0; i < kKeyWords; ++i) key.words[i] = 0x03020100u + 0x04040404u * i;
  const Address nonce = {0x09000000u, 0x4a000000u, 0x00000000u};
  constexpr uint32_t expected[kBlockWords] = {0xe4e7f110, 0x15593bd1, 0x1fdd0f50, 0xc47120a3, 0xc7f4d1c7, 0x0368c033,
                                              0x9aaa2204, 0x4e6cd4c3, 0x466482d2, 0x09aa9f07, 0x05d7c214, 0xa2028bd9,
                                              0xd19c12b5, 0xb94e16de, 0xe883d0cb, 0x4e3c50a2};
  uint32_t out[kBlockWords];
  chacha20_block(key, 1, nonce, out);
  EXPECT(std::memcmp(out, expected, sizeof expected) == 0);
  for_each_level([&] {
    std::vector<uint32_t> input = {kSigma0, kSigma1, kSigma2, kSigma3};
    input.insert(input.end(), key.words, key.words + kKeyWords);
    input.insert(input.end(), {1, nonce.step, nonce.row_low, nonce.row_high});
    std::vector<uint32_t> found(kBlockWords);
    noise_kernels().blocks_of_inputs(input.data(), 1, found.data());
    EXPECT(std::memcmp(found.data(), expected, sizeof expected) == 0);
  });
}

void test_fill() {
  for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 1}, {3, 5}, {7, 12}, {8, 13}, {33, 24}, {1, 5000}, {5, 999}, {100, 128}, {64, 3}}) {
    std::vector<float> expected;
    for_each_level([&, rows = rows, columns = columns] {
      for (const int count : {1, 3}) {
        std::vector<float> out(rows * columns);
        fill_normals({out.data(), rows, columns, 4294967290, key_of(1), 7, 9}, threads(count));
        if (expected.empty()) expected = out;
        EXPECT(out == expected);
      }
    });
  }
}

struct Rows {
  std::vector<float> weight;
  std::vector<float> momentum;
  std::vector<int32_t> last;
};

void test_wake(bool with_momentum, bool listed, Law law) {
  constexpr int64_t kRows = 67;
  constexpr int32_t kStep = 5;
  for (const int64_t columns : {1, 11, 12, 16, 50}) {
    std::mt19937 random(static_cast<uint32_t>(columns));
    Rows start;
    std::vector<int64_t> list;
    for (int64_t i = 0; i < kRows * columns; ++i) {
      start.weight.push_back(static_cast<float>(random() % 1000) / 100.0f);
      start.momentum.push_back(static_cast<float>(random() % 1000) / 100.0f);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      start.last.push_back(static_cast<int32_t>(random() % (kStep + 1)));
      if (random() % 2) list.push_back(r);
    }
    std::vector<float> transition(kStep * (with_momentum ? 4 : 1));
    std::vector<float> factor(kStep * (with_momentum ? 3 : 1));
    for (float& x : transition) x = static_cast<float>(random() % 100) / 50.0f;
    for (float& x : factor) x = static_cast<float>(random() % 100) / 50.0f;
    list.shrink_to_fit();

    Rows expected;
    for_each_level([&] {
      for (const int count : {1, 2, 5}) {
        Rows rows = start;
        wake_rows({rows.weight.data(), with_momentum ? rows.momentum.data() : nullptr, rows.last.data(),
                   listed ? list.data() : nullptr, listed ? static_cast<int64_t>(list.size()) : kRows, columns,
                   transition.data(), factor.data(), key_of(2), 3, kStep, law},
                  threads(count));
        if (expected.weight.empty()) expected = rows;
        EXPECT(rows.weight == expected.weight);
        EXPECT(rows.momentum == expected.momentum);
        EXPECT(rows.last == expected.last);
      }
    });
    for (int64_t r = 0; r < kRows; ++r) {
      const bool due = !listed || std::find(list.begin(), list.end(), r) != list.end();
      EXPECT(expected.last[r] == (due ? kStep : start.last[r]));
      const bool moved = expected.weight[r * columns] != start.weight[r * columns];
      if (!due || start.last[r] == kStep) EXPECT(!moved);
    }
  }
}

void test_keystream() {
  for (const int64_t count : {0, 1, 15, 16, 17, 10000}) {
    std::vector<uint32_t> one(count);
    std::vector<uint32_t> many(count);
    keystream(key_of(3), 1ull << 40, 5, one.data(), count, threads(1));
    keystream(key_of(3), 1ull << 40, 5, many.data(), count, threads(4));
    EXPECT(one == many);
  }
}

// Random bags, empty ones included, through grouping, sums, norms and scatter, against the plain loops.
void test_bags(uint32_t seed) {
  std::mt19937 random(seed);
  const int64_t num_rows = 1 + random() % 50;
  const int64_t features = 1 + random() % 3;
  const int64_t examples = random() % 9;
  const int64_t columns = 1 + random() % 40;
  const int64_t bags = features * examples;
  std::vector<int64_t> offsets = {0};
  for (int64_t g = 0; g < bags; ++g) offsets.push_back(offsets.back() + random() % 5);
  const int64_t count = offsets.back();
  std::vector<int64_t> indices(count);
  std::vector<int64_t> bag(count);
  std::vector<float> weights(count);
  for (int64_t g = 0; g < bags; ++g) std::fill(bag.begin() + offsets[g], bag.begin() + offsets[g + 1], g);
  for (int64_t& row : indices) row = random() % num_rows;
  for (float& w : weights) w = static_cast<float>(random() % 7) - 3.0f;
  std::vector<float> table(num_rows * columns);
  std::vector<float> grad(bags * columns);
  for (float& x : table) x = static_cast<float>(random() % 11) - 5.0f;  // small integers: sums are exact in any order
  for (float& x : grad) x = static_cast<float>(random() % 11) - 5.0f;

  std::vector<int64_t> rows(count);
  std::vector<int64_t> order(count);
  std::vector<int64_t> starts(count + 1);
  const int64_t groups = group_rows(indices.data(), count, num_rows, rows.data(), order.data(), starts.data(),
                                    threads(3));
  EXPECT(starts[groups] == count);
  for (int64_t u = 0; u < groups; ++u) {
    EXPECT(u == 0 || rows[u - 1] < rows[u]);
    for (int64_t i = starts[u]; i < starts[u + 1]; ++i) {
      EXPECT(indices[order[i]] == rows[u]);
      EXPECT(i == starts[u] || order[i - 1] < order[i]);
    }
  }

  std::vector<float> sums(bags * columns);
  bag_sum({table.data(), indices.data(), offsets.data(), weights.data(), sums.data(), bags, columns}, threads(3));
  std::vector<float> expected_sums(bags * columns);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; ++c) expected_sums[bag[i] * columns + c] += weights[i] * table[indices[i] * columns + c];
  EXPECT(sums == expected_sums);

  std::vector<float> norms(examples);
  bag_squared_norms({indices.data(), offsets.data(), weights.data(), grad.data(), norms.data(), features, examples, columns},
                    threads(3));
  for (int64_t e = 0; e < examples; ++e) {
    std::vector<double> sent(num_rows * columns);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < columns && bag[i] % examples == e; ++c)
        sent[indices[i] * columns + c] += static_cast<double>(weights[i]) * static_cast<double>(grad[bag[i] * columns + c]);
    double norm = 0.0;
    for (const double x : sent) norm += x * x;
    EXPECT(norms[e] == static_cast<float>(norm));
  }

  const std::vector<float> scale(bags, 2.0f);
  std::vector<float> expected = table;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; ++c) expected[indices[i] * columns + c] -= weights[i] * 2.0f * grad[bag[i] * columns + c];
  scatter_add({table.data(), {rows.data(), order.data(), starts.data(), bag.data(), groups}, weights.data(), grad.data(),
               scale.data(), -1.0f, columns},
              threads(4));
  EXPECT(table == expected);
}

// Waking and summing in one pass, on any number of threads, is one after the other.
void test_catch_up_bag_sum(int64_t longest_bag) {
  std::mt19937 random(7);
  const int64_t num_rows = 900, columns = 96, bags = 1500;
  std::vector<int64_t> offsets = {0}, indices, bag;
  for (int64_t g = 0; g < bags; ++g) {
    for (int64_t n = random() % static_cast<uint32_t>(longest_bag + 1); n > 0; --n) {
      indices.push_back(random() % num_rows);
      bag.push_back(g);
    }
    offsets.push_back(static_cast<int64_t>(indices.size()));
  }
  const auto count = static_cast<int64_t>(indices.size());
  std::vector<int64_t> rows(count), order(count), starts(count + 1);
  const int64_t groups = group_rows(indices.data(), count, num_rows, rows.data(), order.data(), starts.data(), threads(1));
  const std::vector<float> transition(2, 0.5f), factor(2, 2.0f);
  std::vector<std::vector<float>> tables, results;
  for (const int number : {0, 1, 4}) {  // 0: one after the other
    std::vector<float> table(num_rows * columns, 1.0f), sums(bags * columns);
    std::vector<int32_t> last(num_rows, 0);
    const Wake wake{table.data(), nullptr, last.data(), rows.data(), groups, columns, transition.data(), factor.data(),
                    Key{{1, 2, 3, 4, 5, 6, 7, 8}}, 3, 1, Law::kGaussian};
    const BagSum sum{table.data(), indices.data(), offsets.data(), nullptr, sums.data(), bags, columns};
    if (number > 0) {
      catch_up_bag_sum(wake, sum, {rows.data(), order.data(), starts.data(), bag.data(), groups}, threads(number));
    } else {
      wake_rows(wake, threads(2));
      bag_sum(sum, threads(2));
    }
    tables.push_back(table);
    results.push_back(sums);
  }
  EXPECT(tables[0] == tables[1] && tables[0] == tables[2]);
  EXPECT(results[0] == results[1] && results[0] == results[2]);
}

// As many lookups as are cut into chunks: one thread's groups are those of several.
void test_chunked_groups(int64_t num_rows) {
  std::mt19937_64 random(num_rows);
  const int64_t count = 70001;
  std::vector<int64_t> indices(count);
  for (int64_t& row : indices) row = static_cast<int64_t>(random() % static_cast<uint64_t>(num_rows));
  std::vector<std::vector<int64_t>> results;
  for (const int number : {1, 2, 5}) {
    std::vector<int64_t> all(3 * count + 1);
    all.push_back(group_rows(indices.data(), count, num_rows, all.data(), all.data() + count, all.data() + 2 * count, threads(number)));
    results.push_back(all);
  }
  EXPECT(results[0] == results[1]);
  EXPECT(results[0] == results[2]);
}

}  // namespace

int main() {
  for (const SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512})
    if (level > best_simd_level()) std::printf("%s: skipped, this machine does not run it\n", name_of(level));
  test_chacha20();
  test_fill();
  for (const bool with_momentum : {false, true})
    for (const bool listed : {false, true})
      for (const Law law : {Law::kGaussian, Law::kOnes}) test_wake(with_momentum, listed, law);
  test_keystream();
  for (uint32_t seed = 0; seed < 200; ++seed) test_bags(seed);
  for (const int64_t longest : {1, 4}) test_catch_up_bag_sum(longest);
  for (const int64_t num_rows : {int64_t{1}, int64_t{300}, int64_t{1} << 20, int64_t{1} << 40}) test_chunked_groups(num_rows);
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
