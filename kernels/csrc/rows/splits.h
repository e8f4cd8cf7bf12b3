// From the ordered rows of users to examples: what is held out, what the bound on contributions keeps, what histories are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>

namespace lazydp::rows {

// n rows in order of user and time. Masks that are empty say the same of every row.
struct OrderedRows {
  std::span<const uint32_t> order;     // [n]: which row stands at a place
  std::span<const int64_t> ends;       // [users]: where each user's rows end
  std::span<const uint8_t> test;       // [n], by place: held out; empty: none is
  std::span<const uint8_t> within;     // [n], by place: among the training rows that may be kept; empty: all are
  std::span<const uint8_t> positive;   // [n], by place: stands in histories once it has passed; empty: all do
  uint64_t bound;                      // the latest training rows of a user that are kept

  bool is_test(size_t place) const { return !test.empty() && test[place] != 0; }
  bool is_within(size_t place) const { return within.empty() || within[place] != 0; }
  bool is_positive(size_t place) const { return positive.empty() || positive[place] != 0; }

  // Calls body(user, first place, end) for every user.
  template <class Body>
  void for_users(const Body& body) const {
    size_t from = 0;
    for (size_t user = 0; user < ends.size(); ++user) {
      const auto to = static_cast<size_t>(ends[user]);
      if (to < from || to > order.size()) throw std::invalid_argument("ends: expected ascending places in the order");
      body(user, from, to);
      from = to;
    }
  }
};

// Of each user the training examples, the examples held out, and the items of the history: [users] each.
struct Counts {
  std::span<int64_t> train, test, items;
};

inline void count_examples(const OrderedRows& rows, const Counts& counts) {
  rows.for_users([&](size_t user, size_t from, size_t to) {
    int64_t train = 0, test = 0, items = 0;
    for (size_t place = from; place < to; ++place) {
      const bool held_out = rows.is_test(place);
      test += held_out;
      train += !held_out && rows.is_within(place);
      items += !held_out && rows.is_positive(place);
    }
    counts.train[user] = static_cast<int64_t>(std::min(static_cast<uint64_t>(train), rows.bound));
    counts.test[user] = test;
    counts.items[user] = items;
  });
}

// Examples of one split [m]: their rows and users, and the window of the items before them that is their history.
struct Examples {
  std::span<uint32_t> rows;
  std::span<int64_t> users;
  std::span<int64_t> ends;
  std::span<int32_t> lengths;
  size_t size = 0;

  void add(uint32_t row, size_t user, size_t end, size_t length) {
    if (size == rows.size()) throw std::invalid_argument("counts: expected those of count_examples");
    rows[size] = row;
    users[size] = static_cast<int64_t>(user);
    ends[size] = static_cast<int64_t>(end);
    lengths[size++] = static_cast<int32_t>(length);
  }
};

// Fills the examples of both splits, and `items` with the rows whose items histories are windows of.
inline void fill_examples(const OrderedRows& rows, std::span<const int64_t> train_counts, uint64_t most_history, Examples& train,
                          Examples& test, std::span<uint32_t> items) {
  size_t num_items = 0;
  rows.for_users([&](size_t user, size_t from, size_t to) {
    const size_t first_item = num_items;
    // Rows stand in order of time, so that what is kept are the last ones.
    int64_t to_skip = -train_counts[user];
    for (size_t place = from; place < to; ++place) to_skip += !rows.is_test(place) && rows.is_within(place);
    for (size_t place = from; place < to; ++place) {
      const auto length = static_cast<size_t>(std::min<uint64_t>(num_items - first_item, most_history));
      if (rows.is_test(place)) {
        test.add(rows.order[place], user, num_items, length);
        continue;
      }
      if (rows.is_within(place) && to_skip-- <= 0) train.add(rows.order[place], user, num_items, length);
      if (!rows.is_positive(place)) continue;
      if (num_items == items.size()) throw std::invalid_argument("counts: expected those of count_examples");
      items[num_items++] = rows.order[place];
    }
  });
}

}  // namespace lazydp::rows
