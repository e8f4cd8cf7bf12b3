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
#include "cpu/product_norms.h"
#include "cpu/simd_level.h"
#include "cpu/weighted_products.h"
#include "cpu/weighted_products_amx.h"
#include "expect.h"

namespace {

using namespace lazydp;
using namespace lazydp::cpu;

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
  constexpr const char* names[] = {"portable", "avx2", "avx512", "amx"};
  return names[static_cast<int>(level)];
}

void for_each_level(const std::function<void()>& test) {
  for (const SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512, SimdLevel::kAmx}) {
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

void test_catch_up(bool with_momentum, bool listed, Distribution distribution) {
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
        const CatchUp catch_up{rows.weight.data(),
                               with_momentum ? rows.momentum.data() : nullptr,
                               rows.last.data(),
                               listed ? list.data() : nullptr,
                               listed ? static_cast<int64_t>(list.size()) : kRows,
                               columns,
                               transition.data(),
                               factor.data(),
                               key_of(2),
                               3,
                               kStep,
                               distribution};
        catch_up_rows({&catch_up, 1}, threads(count));
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
  GroupRows to_group{indices.data(), count, num_rows, rows.data(), order.data(), starts.data()};
  group_rows({&to_group, 1}, threads(3));
  const int64_t groups = to_group.groups;
  EXPECT(starts[groups] == count);
  for (int64_t u = 0; u < groups; ++u) {
    EXPECT(u == 0 || rows[u - 1] < rows[u]);
    for (int64_t i = starts[u]; i < starts[u + 1]; ++i) {
      EXPECT(indices[order[i]] == rows[u]);
      EXPECT(i == starts[u] || order[i - 1] < order[i]);
    }
  }

  std::vector<float> sums(bags * columns);
  const BagSum to_sum{table.data(), indices.data(), offsets.data(), weights.data(), sums.data(), bags, columns};
  bag_sum({&to_sum, 1}, threads(3));
  std::vector<float> expected_sums(bags * columns);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; ++c) expected_sums[bag[i] * columns + c] += weights[i] * table[indices[i] * columns + c];
  EXPECT(sums == expected_sums);

  std::vector<double> norms(examples);
  const BagSquaredNorms of_examples{indices.data(), offsets.data(), weights.data(), grad.data(), features, examples, columns};
  bag_squared_norms({&of_examples, 1}, examples, norms.data(), threads(3));
  for (int64_t e = 0; e < examples; ++e) {
    std::vector<double> sent(num_rows * columns);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < columns && bag[i] % examples == e; ++c)
        sent[indices[i] * columns + c] += static_cast<double>(weights[i]) * static_cast<double>(grad[bag[i] * columns + c]);
    double norm = 0.0;
    for (const double x : sent) norm += x * x;
    EXPECT(norms[e] >= norm && norms[e] <= std::max(norm * (1 + 1e-12), 1e-4));  // a part of the largest term where all cancel
  }

  const std::vector<float> scale(bags, 2.0f);
  std::vector<float> expected = table;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; ++c) expected[indices[i] * columns + c] -= weights[i] * 2.0f * grad[bag[i] * columns + c];
  const ScatterAdd to_add{table.data(),   {rows.data(), order.data(), starts.data(), bag.data(), groups},
                          weights.data(), grad.data(),
                          scale.data(),   -1.0,
                          0.0,            columns,
                          bags};
  scatter_add({&to_add, 1}, threads(4));
  EXPECT(table == expected);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; ++c) expected[indices[i] * columns + c] -= weights[i] * 2.0f * grad[bag[i] * columns + c];
  ScatterAdd exact = to_add;
  exact.grid = 0.5;
  scatter_add({&exact, 1}, threads(4));
  EXPECT(table == expected);
}

// One table, what a batch reads of it, and room for all that the kernels write.
struct Table {
  int64_t num_rows, columns, bags, groups;
  std::vector<float> weight, momentum, sums, grad, scale;
  std::vector<int32_t> last;
  std::vector<int64_t> offsets = {0}, indices, rows, order, starts, bag;
  std::vector<float> per_lookup;

  Table(uint32_t seed, int64_t table_rows, int64_t width, int64_t num_bags, int64_t longest_bag)
      : num_rows(table_rows), columns(width), bags(num_bags), weight(num_rows * columns), momentum(num_rows * columns),
        sums(bags * columns), grad(bags * columns), scale(bags, 0.5f), last(num_rows) {
    std::mt19937 random(seed);
    for (int64_t g = 0; g < bags; ++g) {
      for (int64_t n = random() % static_cast<uint32_t>(longest_bag + 1); n > 0; --n) {
        indices.push_back(random() % num_rows);
        bag.push_back(g);
        per_lookup.push_back(static_cast<float>(random() % 2 + 1));
      }
      offsets.push_back(static_cast<int64_t>(indices.size()));
    }
    for (float& x : weight) x = static_cast<float>(random() % 100) / 10.0f;
    for (float& x : momentum) x = static_cast<float>(random() % 100) / 10.0f;
    for (float& x : grad) x = static_cast<float>(random() % 100) / 10.0f;
    for (int32_t& step : last) step = static_cast<int32_t>(random() % 3);
    indices.shrink_to_fit();
    bag.shrink_to_fit();
    rows.resize(count());
    order.resize(count());
    starts.resize(count() + 1);
  }

  int64_t count() const { return static_cast<int64_t>(indices.size()); }
  GroupRows to_group() { return {indices.data(), count(), num_rows, rows.data(), order.data(), starts.data()}; }
  Grouping grouping() const { return {rows.data(), order.data(), starts.data(), bag.data(), groups}; }
  BagSum to_sum(bool weighted) {
    return {weight.data(), indices.data(), offsets.data(), weighted ? per_lookup.data() : nullptr, sums.data(), bags, columns};
  }
  CatchUp to_catch_up(bool with_momentum, uint32_t number) {
    static const std::vector<float> numbers(8, 0.5f);
    return {weight.data(),
            with_momentum ? momentum.data() : nullptr,
            last.data(),
            rows.data(),
            groups,
            columns,
            numbers.data(),
            numbers.data(),
            key_of(5),
            number,
            2,
            Distribution::kGaussian};
  }
  BagSquaredNorms to_norm() const { return {indices.data(), offsets.data(), per_lookup.data(), grad.data(), 1, bags, columns}; }
  ScatterAdd to_add(bool weighted) {
    const float* const weights = weighted ? per_lookup.data() : nullptr;
    return {weight.data(), grouping(), weights, grad.data(), scale.data(), -0.5, 0.25, columns, bags};
  }
};

// Tables of unlike sizes, one long enough for several chunks and one that nobody reads.
std::vector<Table> tables_of(int64_t longest_bag) {
  std::vector<Table> tables;
  tables.emplace_back(1, 900, 96, 1500, longest_bag);
  tables.emplace_back(2, 1, 7, 1500, longest_bag);
  tables.emplace_back(3, 5000, 2, 1500, 60);
  tables.emplace_back(4, 100, 128, 1500, 0);
  tables.emplace_back(5, 300, 13, 1500, longest_bag);
  return tables;
}

// Every kernel on several tables as one, on any number of threads, is one table after the other, one operation after the other.
void test_tables(int64_t longest_bag, bool with_momentum, bool weighted) {
  std::vector<std::vector<Table>> results;
  std::vector<std::vector<double>> norms;
  for (const int number : {0, 1, 4}) {  // 0: one after the other
    std::vector<Table> tables = tables_of(longest_bag);
    std::vector<GroupRows> groups;
    for (Table& table : tables) groups.push_back(table.to_group());
    if (number > 0) {
      group_rows(groups, threads(number));
    } else {
      for (GroupRows& job : groups) group_rows({&job, 1}, threads(1));
    }
    std::vector<CatchUpBagSum> catch_ups;
    std::vector<BagSquaredNorms> to_norm;
    std::vector<ScatterAdd> to_add;
    for (size_t j = 0; j < tables.size(); ++j) {
      tables[j].groups = groups[j].groups;
      catch_ups.push_back({tables[j].to_catch_up(with_momentum, j), tables[j].to_sum(weighted), tables[j].grouping()});
      to_norm.push_back(tables[j].to_norm());
      to_add.push_back(tables[j].to_add(weighted));
    }
    std::vector<double> norm(1500);
    if (number > 0) {
      catch_up_bag_sum(catch_ups, threads(number));
      bag_squared_norms(to_norm, 1500, norm.data(), threads(number));
      scatter_add(to_add, threads(number));
    } else {
      for (const CatchUpBagSum& job : catch_ups) {
        catch_up_rows({&job.catch_up, 1}, threads(2));
        bag_sum({&job.sum, 1}, threads(2));
      }
      bag_squared_norms(to_norm, 1500, norm.data(), threads(1));
      for (const ScatterAdd& job : to_add) scatter_add({&job, 1}, threads(2));
    }
    results.push_back(tables);
    norms.push_back(norm);
  }
  for (size_t i = 1; i < results.size(); ++i) {
    EXPECT(norms[i] == norms[0]);
    for (size_t j = 0; j < results[0].size(); ++j) {
      EXPECT(results[i][j].weight == results[0][j].weight);
      EXPECT(results[i][j].momentum == results[0][j].momentum);
      EXPECT(results[i][j].last == results[0][j].last);
      EXPECT(results[i][j].sums == results[0][j].sums);
      EXPECT(results[i][j].order == results[0][j].order);
    }
  }
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
    GroupRows job{indices.data(), count, num_rows, all.data(), all.data() + count, all.data() + 2 * count};
    group_rows({&job, 1}, threads(number));
    all.push_back(job.groups);
    results.push_back(all);
  }
  EXPECT(results[0] == results[1]);
  EXPECT(results[0] == results[2]);
}

// Equal up to the rounding of sums of float32, which AMX adds in an order of its own.
bool near(const std::vector<double>& one, const std::vector<double>& other) {
  return std::equal(one.begin(), one.end(), other.begin(), [](double a, double b) { return std::fabs(a - b) < 1e-4; });
}

// Every level and any number of threads: one chain of fused multiply-adds in a block, blocks in float64.
void test_weighted_products(int64_t units, int64_t outputs, int64_t columns, int64_t block) {
  std::mt19937 random(static_cast<uint32_t>(units + outputs + columns));
  const auto some = [&](int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(static_cast<int32_t>(random())) * 0x1p-31f;
    return values;
  };
  const std::vector<float> grads = some(units * outputs), inputs = some(units * columns), scale = some(units);
  std::vector<int64_t> order(units);
  for (int64_t k = 0; k < units; ++k) order[k] = k;
  std::shuffle(order.begin(), order.end(), random);
  const auto expected_from = [&](double start) {
    std::vector<double> expected(outputs * columns, start);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < columns; ++i)
        for (int64_t begin = 0; begin < units; begin += block) {
          float chain = 0.0f;
          for (int64_t k = begin; k < std::min(begin + block, units); ++k) {
            const int64_t unit = order[k];
            chain = std::fma(scale[unit] * grads[unit * outputs + o], inputs[unit * columns + i], chain);
          }
          expected[o * columns + i] += static_cast<double>(chain);
        }
    return expected;
  };
  const std::vector<double> added = expected_from(1.0), overwritten = expected_from(0.0);
  for_each_level([&] {
    const bool own_order = simd_level() == SimdLevel::kAmx && block >= kLeastAmxBlock;
    std::vector<double> first[2];
    for (const int count : {1, 3})
      for (const bool overwrite : {false, true}) {
        std::vector<double> out(outputs * columns, overwrite ? std::nan("") : 1.0);
        weighted_product({grads.data(), inputs.data(), scale.data(), order.data(), units, outputs, columns, block, out.data(),
                          overwrite},
                         threads(count));
        const std::vector<double>& expected = overwrite ? overwritten : added;
        if (count == 1) first[overwrite] = own_order ? out : expected;
        EXPECT(out == first[overwrite]);
        EXPECT(near(out, expected));
      }
  });

  std::vector<double> norms[2] = {std::vector<double>(units), std::vector<double>(units)};
  for (const int count : {1, 3}) {
    const LayerPair layer{inputs.data(), grads.data(), columns, outputs, true, true};
    product_norms({{layer, layer}, units, norms[count / 3].data()}, threads(count));
  }
  EXPECT(norms[0] == norms[1]);

  const std::vector<double> weights(scale.begin(), scale.end());
  std::vector<double> one(columns), other(columns);
  weighted_sum({inputs.data(), weights.data(), units, columns, one.data()}, threads(1));
  weighted_sum({inputs.data(), weights.data(), units, columns, other.data()}, threads(3));
  EXPECT(one == other);
  std::vector<float> rounded(columns);
  noised_sum({one.data(), scale.data(), 0.5, std::min(columns, units), rounded.data()}, threads(2));
  for (int64_t i = 0; i < std::min(columns, units); ++i)
    EXPECT(rounded[i] == static_cast<float>(one[i] + 0.5 * static_cast<double>(scale[i])));
}

}  // namespace

int main() {
  for (const SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512, SimdLevel::kAmx})
    if (level > best_simd_level()) std::printf("%s: skipped, this machine does not run it\n", name_of(level));
  test_chacha20();
  test_fill();
  for (const bool with_momentum : {false, true})
    for (const bool listed : {false, true})
      for (const Distribution distribution : {Distribution::kGaussian, Distribution::kOnes})
        test_catch_up(with_momentum, listed, distribution);
  test_keystream();
  for (uint32_t seed = 0; seed < 200; ++seed) test_bags(seed);
  for_each_level([] {
    for (const int64_t longest : {1, 4})
      for (const bool with_momentum : {false, true}) test_tables(longest, with_momentum, with_momentum);
  });
  for (const int64_t num_rows : {int64_t{1}, int64_t{300}, int64_t{1} << 20, int64_t{1} << 40}) test_chunked_groups(num_rows);
  for (const int64_t size : {1, 5, 13, 14, 16, 33, 70}) {
    test_weighted_products(130, size, 40, 63);
    test_weighted_products(65, 9, size, 1);
  }
  test_weighted_products(1100, 17, 130, 500);
  test_weighted_products(2200, 130, 70, 96);
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
