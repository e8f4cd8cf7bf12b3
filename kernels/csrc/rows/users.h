// The rows of users: parted by the hash of their user, then ordered by user and time.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "rows/order.h"

namespace lazydp::rows {

// A batch whose rows name their users by number.
struct NamedRows {
  std::span<const int32_t> entries;    // [n]: which of the named users
  std::span<const uint8_t> accepted;   // [n]; empty: all are
  std::span<const uint64_t> hashes;    // of the named users [d]

  size_t user(size_t row) const {
    const auto entry = static_cast<size_t>(static_cast<uint32_t>(entries[row]));
    if (entry >= hashes.size()) throw std::invalid_argument("entries: expected numbers of the users named");
    return entry;
  }
  bool taken(size_t row) const { return accepted.empty() || accepted[row] != 0; }
};

// What `part_by_user` finds. Rows and users of a part lie side by side, those of part p up to ends[p] and user_ends[p].
struct PartedRows {
  std::span<int64_t> ends, user_ends;  // [parts]
  std::span<uint32_t> rows;            // [n]: the rows that are accepted, in their order within a part
  std::span<uint32_t> local;           // [n]: of each of them, which of its part's users it is of
  std::span<uint32_t> users;           // [d]: the users that have rows, in the order in which they appear within a part
};

inline void begins_from_counts(std::span<int64_t> counts) {
  int64_t before = 0;
  for (int64_t& count : counts) {
    const int64_t next = before + count;
    count = before;
    before = next;
  }
}

inline void part_by_user(const NamedRows& named, const PartedRows& found) {
  constexpr uint32_t kUnseen = std::numeric_limits<uint32_t>::max();
  // A user's part, and its number among the users of that part: side by side, since each row looks for both.
  struct User {
    uint32_t part, number;
  };
  std::vector<User> users(named.hashes.size());
  const uint64_t parts = found.ends.size();
  for (size_t user = 0; user < users.size(); ++user)
    users[user] = {static_cast<uint32_t>(part_of_hash(named.hashes[user], parts)), kUnseen};
  std::fill(found.ends.begin(), found.ends.end(), 0);
  std::fill(found.user_ends.begin(), found.user_ends.end(), 0);
  for (size_t row = 0; row < named.entries.size(); ++row) {
    if (!named.taken(row)) continue;
    User& user = users[named.user(row)];
    if (user.number == kUnseen) user.number = static_cast<uint32_t>(found.user_ends[user.part]++);
    ++found.ends[user.part];
  }
  begins_from_counts(found.user_ends);
  begins_from_counts(found.ends);
  for (size_t row = 0; row < named.entries.size(); ++row) {
    if (!named.taken(row)) continue;
    const User& user = users[named.user(row)];
    const auto place = static_cast<size_t>(found.ends[user.part]++);
    found.rows[place] = static_cast<uint32_t>(row);
    found.local[place] = user.number;
  }
  std::vector<int64_t> counted(parts, 0);
  for (size_t named_user = 0; named_user < users.size(); ++named_user) {
    const User& user = users[named_user];
    if (user.number == kUnseen) continue;
    found.users[static_cast<size_t>(found.user_ends[user.part]) + user.number] = static_cast<uint32_t>(named_user);
    ++counted[user.part];
  }
  for (size_t part = 0; part < parts; ++part) found.user_ends[part] += counted[part];
}

// Orders the rows of users that are numbered: by user, then by time.
class UserOrder {
 public:
  // time: [n], or empty where rows have none; times that agree are left to be settled by the caller.
  explicit UserOrder(std::span<const int64_t> time) : time_(time) {}

  // users: [n], the number of each row's user; ends: [number of users]; order, ties: [n]. A row is marked 1 where it is the
  // first of several of one user and time, 2 where it is another of them, else 0.
  void sort(std::span<const uint32_t> users, std::span<int64_t> ends, std::span<uint32_t> order, std::span<uint8_t> ties) {
    group(users, ends, order);
    size_t from = 0;
    for (const int64_t end : ends) {
      const auto to = static_cast<size_t>(end);
      if (to < from || to > order.size()) throw std::invalid_argument("ends: expected those of the order");
      sort_user(order.subspan(from, to - from), ties.subspan(from, to - from));
      from = to;
    }
  }

 private:
  // Above, keys would take more memory than they save time; below, to move them by digits does not pay.
  static constexpr size_t kMostKeys = 1 << 16, kFewKeys = 64;
  static constexpr int kDigit = 8;

  static void group(std::span<const uint32_t> users, std::span<int64_t> ends, std::span<uint32_t> order) {
    std::fill(ends.begin(), ends.end(), 0);
    for (const uint32_t user : users) {
      if (user >= ends.size()) throw std::invalid_argument("users: expected numbers below that of the users");
      ++ends[user];
    }
    begins_from_counts(ends);
    for (size_t row = 0; row < users.size(); ++row) order[static_cast<size_t>(ends[users[row]]++)] = static_cast<uint32_t>(row);
  }

  void sort_user(std::span<uint32_t> rows, std::span<uint8_t> ties) {
    if (!time_.empty() && rows.size() > 1 && !sort_by_keys(rows)) {
      std::sort(rows.begin(), rows.end(), [this](uint32_t left, uint32_t right) {
        return time_[left] != time_[right] ? time_[left] < time_[right] : left < right;
      });
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      const bool again = i > 0 && (time_.empty() || time_[rows[i]] == time_[rows[i - 1]]);
      ties[i] = again ? 2 : 0;
      if (again && ties[i - 1] == 0) ties[i - 1] = 1;
    }
  }

  // Sorts by words of time and place; false where a word does not hold both.
  bool sort_by_keys(std::span<uint32_t> rows) {
    if (rows.size() > kMostKeys) return false;
    int64_t low = time_[rows[0]], high = low;
    for (const uint32_t row : rows) low = std::min(low, time_[row]), high = std::max(high, time_[row]);
    const int place_bits = std::bit_width(rows.size() - 1);
    const int time_bits = std::bit_width(static_cast<uint64_t>(high) - static_cast<uint64_t>(low));
    if (place_bits + time_bits > 64) return false;
    if (time_bits == 0) return true;
    keys_.resize(rows.size());
    for (size_t i = 0; i < rows.size(); ++i)
      keys_[i] = (static_cast<uint64_t>(time_[rows[i]]) - static_cast<uint64_t>(low)) << place_bits | i;
    if (rows.size() <= kFewKeys)
      std::sort(keys_.begin(), keys_.end());
    else
      sort_digits(place_bits, place_bits + time_bits);
    before_.assign(rows.begin(), rows.end());
    const uint64_t mask = (uint64_t{1} << place_bits) - 1;
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = before_[keys_[i] & mask];
    return true;
  }

  // Moves keys by one digit after the other, the lowest first; below `from` they are in order already.
  void sort_digits(int from, int to) {
    moved_.resize(keys_.size());
    for (int shift = from; shift < to; shift += kDigit) {
      std::array<uint32_t, 1 << kDigit> places{};
      const auto digit = [shift](uint64_t key) { return (key >> shift) & ((1 << kDigit) - 1); };
      for (const uint64_t key : keys_) ++places[digit(key)];
      uint32_t before = 0;
      for (uint32_t& place : places) {
        const uint32_t count = place;
        place = before;
        before += count;
      }
      for (const uint64_t key : keys_) moved_[places[digit(key)]++] = key;
      std::swap(keys_, moved_);
    }
  }

  std::span<const int64_t> time_;
  std::vector<uint64_t> keys_, moved_;
  std::vector<uint32_t> before_;
};

}  // namespace lazydp::rows
