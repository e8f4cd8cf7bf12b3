// The cores of the extension that reads logs, without Python, to be run under sanitizers (sanitize.sh).
//
// Every buffer is allocated at exactly its size, so that AddressSanitizer sees one element too many; several threads work on
// the same inputs, so that ThreadSanitizer sees every race. What is computed is compared with plain tellings in
// tests/kernels/test_rows.py; here results are compared between instruction sets and threads.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"
#include "rows/codes.h"
#include "rows/hashes.h"
#include "rows/look_up.h"
#include "rows/numbers.h"
#include "rows/order.h"
#include "rows/splits.h"
#include "rows/users.h"

namespace {

using namespace lazydp::rows;

bool refuses(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

struct OwnedTexts {
  std::vector<uint8_t> bytes;
  std::vector<int32_t> offsets = {0};

  void add(const std::string& text) {
    bytes.insert(bytes.end(), text.begin(), text.end());
    offsets.push_back(static_cast<int32_t>(bytes.size()));
  }
  Texts texts() {
    bytes.shrink_to_fit();
    offsets.shrink_to_fit();
    return Texts(bytes, std::span<const int32_t>(offsets));
  }
};

OwnedTexts some_texts(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  OwnedTexts owned;
  for (size_t i = 0; i < count; ++i) owned.add(std::string(random() % (i % 7 == 0 ? 300 : 20), 'a' + random() % 26));
  return owned;
}

// Runs the same work on several threads at once; all must agree.
template <class Result>
Result on_threads(const std::function<Result()>& work) {
  std::vector<Result> results(3);
  std::vector<std::thread> pool;
  for (Result& result : results) pool.emplace_back([&result, &work] { result = work(); });
  for (std::thread& thread : pool) thread.join();
  for (const Result& result : results) EXPECT(result == results[0]);
  return results[0];
}

void test_codes() {
  OwnedTexts owned = some_texts(1001, 1);
  const Texts texts = owned.texts();
  const std::vector<uint8_t> key = {1, 2, 3}, person = {4};
  std::vector<int64_t> portable;
  for (const char* level : {"portable", "avx2", "avx512"}) {
    const blake2b::Lanes lanes = blake2b::lanes_named(level);
    if (lanes.count == 0) continue;
    for (const bool keyed : {true, false}) {
      const KeyedBlake2b hash(keyed ? std::span<const uint8_t>(key) : std::span<const uint8_t>(), person, lanes);
      const auto codes = on_threads<std::vector<int64_t>>([&] {
        std::vector<int64_t> found(texts.size());
        hashed_codes(hash, 1000, texts, std::span(found));
        return found;
      });
      for (size_t row = 0; row < texts.size(); ++row) EXPECT(codes[row] == static_cast<int64_t>(1 + hash(texts[row]) % 1000));
      if (keyed && portable.empty()) portable = codes;
      if (keyed) EXPECT(codes == portable);
    }
  }
  EXPECT(blake2b::lanes_named("none").count == 0);
  OwnedTexts listed = some_texts(1, 2);
  for (int i = 0; i < 50; ++i) listed.add("known " + std::to_string(i));
  const Texts known = listed.texts();
  std::vector<uint32_t> slots(128);
  fill_slots(known, slots);
  std::vector<int64_t> places(known.size());
  find_texts(known, std::span<const uint32_t>(slots), known, std::span(places));
  for (size_t row = 0; row < places.size(); ++row) EXPECT(places[row] == static_cast<int64_t>(row + 1));
  EXPECT(refuses([&] { fill_slots(known, std::span(slots).first(64)); }));
  const std::vector<uint8_t> bytes = {'a'};
  const std::vector<int32_t> beyond = {0, 2}, descending = {1, 0};
  EXPECT(refuses([&] { Texts(bytes, std::span<const int32_t>(beyond)); }));
  EXPECT(refuses([&] { Texts(bytes, std::span<const int32_t>(descending)); }));
}

void test_hashes() {
  std::mt19937_64 random(3);
  std::vector<int64_t> numbers(40'000);
  for (int64_t& number : numbers) number = static_cast<int64_t>(random()) >> (random() % 64);
  numbers[0] = INT64_MIN, numbers[1] = INT64_MAX, numbers[2] = 0;
  const auto hashes = on_threads<std::vector<uint64_t>>([&] {
    std::vector<uint64_t> found(numbers.size());
    hash_decimals_of(numbers, found);
    return found;
  });
  for (size_t row = 0; row < numbers.size(); ++row) EXPECT(hashes[row] == hash_decimal(numbers[row]));
}

void test_order() {
  std::mt19937_64 random(4);
  constexpr size_t kRows = 3000;
  std::vector<uint64_t> hashes(kRows), content(kRows);
  std::vector<int64_t> time(kRows), order(kRows);
  std::vector<double> part(kRows);
  OwnedTexts owned;
  for (size_t row = 0; row < kRows; ++row) {
    // Few users, of whom two share a hash; times that agree.
    const uint64_t user = random() % 40;
    hashes[row] = mix(user / 2);
    owned.add("user " + std::to_string(user));
    time[row] = static_cast<int64_t>(random() % 9) - 4;
    part[row] = static_cast<double>(random() % 2) / 2;
    content[row] = random() % 5;
  }
  RowOrder({hashes, time, part, content}).sort(order);
  const Texts users = owned.texts();
  std::vector<uint32_t> numbers(kRows), firsts(kRows);
  EXPECT(UserNumbers(hashes, users).fill(numbers, firsts) == 40);
  EXPECT(*std::max_element(numbers.begin(), numbers.end()) == 39);
  // All share a hash: users are found by sorting.
  EXPECT(UserNumbers(std::vector<uint64_t>(kRows, 7), users).fill(numbers, firsts) == 40);
  for (size_t i = 1; i < kRows; ++i) EXPECT(hashes[static_cast<size_t>(order[i - 1])] <= hashes[static_cast<size_t>(order[i])]);
  std::vector<int64_t> ends(7);
  order_by_part(hashes, ends, order);
  EXPECT(ends.back() == static_cast<int64_t>(kRows));
}

// Integers with gaps, whose first bit is within a byte.
void test_integers() {
  const std::vector<int32_t> values{3, -2, 9, 5};
  const std::vector<uint8_t> bits{0b01011000};  // from bit 3 on: valid, valid, missing, valid
  const Integers<int32_t> integers{values, bits, 3};
  EXPECT(range_of(integers) == std::pair(int64_t{-2}, int64_t{5}));
  std::vector<float> table(9), out(4);
  std::iota(table.begin(), table.end(), -2.0f);
  look_up(integers, -2, table, out);
  EXPECT((out == std::vector<float>{3, -2, 6, 5}));
}

// Rows of named users, parted, ordered by time and split.
void test_users() {
  std::mt19937_64 random(5);
  constexpr size_t kRows = 5000, kNamed = 60;
  std::vector<int32_t> entries(kRows);
  std::vector<uint8_t> accepted(kRows);
  std::vector<uint64_t> hashes(kNamed);
  for (uint64_t& hash : hashes) hash = random();
  for (size_t row = 0; row < kRows; ++row) entries[row] = static_cast<int32_t>(random() % kNamed), accepted[row] = random() % 4 != 0;
  const NamedRows batch{entries, accepted, hashes};
  const auto taken = static_cast<size_t>(std::count(accepted.begin(), accepted.end(), 1));
  on_threads<std::vector<uint32_t>>([&] {
    std::vector<int64_t> ends(8), user_ends(8);
    std::vector<uint32_t> rows(taken), local(taken), users(kNamed);
    part_by_user(batch, {ends, user_ends, rows, local, users});
    EXPECT(ends.back() == static_cast<int64_t>(taken));
    return rows;
  });
  entries[7] = static_cast<int32_t>(kNamed);
  accepted[7] = 1;
  std::vector<int64_t> ends(8), user_ends(8);
  std::vector<uint32_t> rows(kRows), local(kRows), users(kNamed);
  EXPECT(refuses([&] { part_by_user(batch, {ends, user_ends, rows, local, users}); }));
}

void test_splits() {
  std::mt19937_64 random(6);
  constexpr size_t kUsers = 50;
  for (const int64_t span : {int64_t{20}, int64_t{1} << 40, INT64_MAX}) {
    const size_t size = 70'000;
    std::vector<uint32_t> users(size), order(size);
    std::vector<int64_t> time(size), ends(kUsers);
    std::vector<uint8_t> ties(size), test(size), within(size), positive(size);
    for (size_t row = 0; row < size; ++row) {
      // Most rows are one user's: more than are sorted by words.
      users[row] = random() % 50 == 0 ? static_cast<uint32_t>(random() % (kUsers - 1)) : 0;
      time[row] = static_cast<int64_t>(random() % static_cast<uint64_t>(span)) - span / 2;
      test[row] = random() % 5 == 0, within[row] = random() % 9 != 0, positive[row] = random() % 3 != 0;
    }
    UserOrder(time).sort(users, ends, order, ties);
    for (size_t i = 1; i < size; ++i) {
      const bool same = users[order[i]] == users[order[i - 1]];
      EXPECT(users[order[i - 1]] <= users[order[i]]);
      EXPECT(!same || time[order[i - 1]] <= time[order[i]]);
      EXPECT((ties[i] == 2) == (same && time[order[i - 1]] == time[order[i]]));
    }
    const OrderedRows rows{order, ends, test, within, positive, 30};
    std::vector<int64_t> train(kUsers), tested(kUsers), items(kUsers);
    count_examples(rows, {train, tested, items});
    const auto total = [](const std::vector<int64_t>& counts) {
      size_t sum = 0;
      for (const int64_t count : counts) sum += static_cast<size_t>(count);
      return sum;
    };
    struct Arrays {
      explicit Arrays(size_t length) : rows(length), users(length), ends(length), lengths(length) {}
      Examples examples() { return {rows, users, ends, lengths}; }
      std::vector<uint32_t> rows;
      std::vector<int64_t> users, ends;
      std::vector<int32_t> lengths;
    };
    Arrays of_train(total(train)), of_test(total(tested));
    std::vector<uint32_t> item_rows(total(items));
    Examples trained = of_train.examples(), held_out = of_test.examples();
    fill_examples(rows, train, 7, trained, held_out, item_rows);
    EXPECT(trained.size == of_train.rows.size());
    EXPECT(held_out.size == of_test.rows.size());
    EXPECT(*std::max_element(train.begin(), train.end()) == 30);
    // Arrays for fewer examples than there are.
    Arrays none(0);
    Examples fewer = none.examples(), enough = of_test.examples();
    EXPECT(refuses([&] { fill_examples(rows, train, 7, fewer, enough, item_rows); }));
    users[3] = kUsers;
    EXPECT(refuses([&] { UserOrder(time).sort(users, ends, order, ties); }));
  }
}

}  // namespace

int main() {
  test_codes();
  test_hashes();
  test_order();
  test_integers();
  test_users();
  test_splits();
  if (failures == 0) std::puts("rows: all native tests passed");
  return failures == 0 ? 0 : 1;
}
