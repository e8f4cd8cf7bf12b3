"""Hashes, codes and the order of rows: C++ on numpy arrays, behind `lazydp.kernels._rows`.

Loads no torch: reading a log has no use for it. Arrays are contiguous. Every function lets other threads run, and
depends on its arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lazydp.kernels import _rows

Array: TypeAlias = np.ndarray[Any, Any]
Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]
Rows: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]
Allocate: TypeAlias = Callable[[int, Any], Array]


@dataclass(frozen=True, slots=True)
class Texts:
    """n texts as Arrow lays them out: bytes, and where in them each begins.

    data: anything with the buffer protocol, in bytes; None where there are none.
    offsets: int32 or int64 [n + 1], ascending.
    """

    data: Any
    offsets: Array

    def __len__(self) -> int:
        return len(self.offsets) - 1


def hash_texts(texts: Texts) -> Words:
    """A 64-bit hash of each text: the sum over its bytes of mix(byte ^ mix(position)), then the length chained in."""
    hashes = np.empty(len(texts), dtype=np.uint64)
    _rows.hash_texts(texts.data, texts.offsets, hashes)
    return hashes


def hash_decimals(values: Array) -> Words:
    """`hash_texts` of the decimal digits of each of int64 [n]."""
    hashes = np.empty(len(values), dtype=np.uint64)
    _rows.hash_decimals(np.ascontiguousarray(values, dtype=np.int64), hashes)
    return hashes


def chain(hashes: Words, values: Array, *, without_zeros: bool = False) -> None:
    """Take one more column into the hashes of rows, in place: mix(hash ^ mix(word)).

    Args:
        hashes: uint64 [n], changed.
        values: float32, float64, int32, int64, uint64, uint8 or bool [n]; the word is the bits of a double or an int64.
        without_zeros: leave the hash of a row as it is whose word is 0.

    Raises:
        ValueError: another type, or another length.
    """
    _rows.chain(hashes, np.ascontiguousarray(values), without_zeros)


def sums(words: Words) -> tuple[int, int]:
    """The sums, modulo 2^64, of mix(word) and of mix(word ^ 1)."""
    return _rows.sums(words)


def sums_of_pairs(entries: Array, firsts: Words, seconds: Words | None) -> tuple[int, int]:
    """`sums` of the words firsts[entries], with `seconds` chained in where it is given.

    Args:
        entries: int32 [n], places of `firsts`.
        firsts: uint64 [d].
        seconds: uint64 [n].

    Raises:
        ValueError: an entry is no place of `firsts`.
    """
    return _rows.sums_of_pairs(entries, firsts, seconds)


def hashed_codes(texts: Texts, *, key: bytes, person: bytes, buckets: int, level: str = "") -> Rows:
    """Codes 1..buckets: BLAKE2b (RFC 7693) of 8 bytes, keyed, little-endian, modulo `buckets`, plus 1.

    Args:
        texts: what is hashed.
        key, person: of BLAKE2b.
        buckets: number of codes.
        level: portable, avx2 or avx512, for tests: all give the same codes. Left out, the best that this machine runs
            or that LAZYDP_SIMD names.

    Raises:
        ValueError: no bucket, a key over 64 bytes, a person over 16, or a level that this machine does not run.
    """
    codes = np.empty(len(texts), dtype=np.int64)
    _rows.hashed_codes(key, person, buckets, texts.data, texts.offsets, codes, level)
    return codes


class TextIndex:
    """Where a text stands in a list of distinct texts; built once, asked many times and from many threads."""

    def __init__(self, known: Texts) -> None:
        """Index the texts; O(n) time, and 8 to 16 bytes for each."""
        self._known = known
        self._slots = np.empty(1 << max(2 * len(known) - 1, 1).bit_length(), dtype=np.uint32)
        _rows.fill_slots(known.data, known.offsets, self._slots)

    def find(self, texts: Texts) -> Rows:
        """The place of each text in the list, counted from 1; 0 where it isn't there."""
        places = np.empty(len(texts), dtype=np.int64)
        _rows.find_texts(self._known.data, self._known.offsets, self._slots, texts.data, texts.offsets, places)
        return places


def order_by_part(hashes: Words, num_parts: int) -> tuple[Rows, Rows]:
    """Rows parted by the high bits of their hashes, in their order within a part.

    Returns:
        The rows, int64 [n], and where each part ends among them, int64 [num_parts].
    """
    order, ends = np.empty(len(hashes), dtype=np.int64), np.empty(num_parts, dtype=np.int64)
    _rows.order_by_part(hashes, ends, order)
    return order, ends


def order_rows(
    group: Words, *, time: Array | None = None, part: Array | None = None, content: Words | None = None
) -> Rows:
    """The rows by group, then time (int64), part (float64) and content (uint64), where given: int64 [n]."""
    order = np.empty(len(group), dtype=np.int64)
    _rows.order_rows(group, time, part, content, order)
    return order


def number_users(hashes: Words, users: Texts) -> tuple[Array, Array]:
    """Numbers for users that are named again and again, by the order of (hash, text).

    Args:
        hashes: of the texts, uint64 [n]; texts may agree in them.
        users: texts [n].

    Returns:
        The number of each of the users, uint32 [n], and where each user stands first, uint32 [number of users].

    Raises:
        ValueError: there are not as many hashes as texts.
    """
    numbers, firsts = np.empty(len(users), dtype=np.uint32), np.empty(len(users), dtype=np.uint32)
    found = _rows.number_users(hashes, users.data, users.offsets, numbers, firsts)
    return numbers, firsts[:found]


@dataclass(frozen=True, slots=True)
class PartedRows:
    """Rows and users by part: those of part p lie up to ends[p] and user_ends[p].

    rows: uint32 [m], the accepted rows, in their order within a part.
    local: uint32 [m], which user of its part each of them is of.
    ends: int64 [parts].
    users: uint32 [k], the users that have rows; those of a part in the order in which they appear.
    user_ends: int64 [parts].
    """

    rows: Array
    local: Array
    ends: Rows
    users: Array
    user_ends: Rows


def part_by_user(entries: Array, hashes: Words, num_parts: int, *, accepted: Array | None = None) -> PartedRows:
    """Rows parted by the high bits of the hashes of their users.

    Args:
        entries: int32 [n], each row's user among those named.
        hashes: uint64 [d], of the users named.
        num_parts: number of parts.
        accepted: bool [n], the rows that count; all where it is left out.

    Raises:
        ValueError: an entry names no user, or there is no part.
    """
    size = len(entries)
    rows, local = np.empty(size, dtype=np.uint32), np.empty(size, dtype=np.uint32)
    users = np.empty(len(hashes), dtype=np.uint32)
    ends, user_ends = np.empty(num_parts, dtype=np.int64), np.empty(num_parts, dtype=np.int64)
    _rows.part_by_user(entries, accepted, hashes, ends, user_ends, rows, local, users)
    return PartedRows(rows[: ends[-1]], local[: ends[-1]], ends, users[: user_ends[-1]], user_ends)


def empty_array(size: int, dtype: Any) -> Array:
    """An array in memory; what takes its place may give out one that lies in a file."""
    return np.empty(size, dtype=dtype)


def order_by_time(
    users: Array, num_users: int, time: Array | None, *, empty: Allocate = empty_array
) -> tuple[Array, Rows, Array]:
    """The rows by user, then by time.

    Args:
        users: uint32 [n], each row's user, below `num_users`.
        num_users: number of users.
        time: int64 [n]; None where rows have none.
        empty: makes the arrays of n entries.

    Returns:
        The rows, uint32 [n]; where each user's end among them, int64 [num_users]; and uint8 [n], 1 for the first of
        several rows of one user and time, 2 for the others of them, else 0.

    Raises:
        ValueError: a user is none of `num_users`.
    """
    order, ties = empty(len(users), np.uint32), empty(len(users), np.uint8)
    ends = np.empty(num_users, dtype=np.int64)
    _rows.order_by_time(users, time, ends, order, ties)
    return order, ends, ties


@dataclass(frozen=True, slots=True)
class OrderedRows:
    """Rows in order of user and time; masks are by place in that order, None where they say the same of every row.

    order: uint32 [n], which row stands at a place.
    ends: int64 [users], where each user's rows end.
    test: bool [n], held out; None: none is.
    within: bool [n], the training rows that may be kept; None: all.
    positive: bool [n], rows whose items stand in histories; None: all.
    bound: the latest training rows of a user that are kept; None: all.
    """

    order: Array
    ends: Rows
    test: Array | None = None
    within: Array | None = None
    positive: Array | None = None
    bound: int | None = None


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of one split, [m].

    rows: uint32, the row of each.
    users: int64, its user.
    history_ends, history_lengths: int64 and int32, the window of the items of all users that is its history.
    """

    rows: Array
    users: Array
    history_ends: Array
    history_lengths: Array

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class SplitUsers:
    """Examples of the users' rows.

    train, test: the two splits.
    items: uint32, the rows whose items histories are windows of: one user's after the other's.
    train_counts, test_counts, item_counts: int64 [users], how many of each are a user's.
    """

    train: Examples
    test: Examples
    items: Array
    train_counts: Rows
    test_counts: Rows
    item_counts: Rows


def split_users(rows: OrderedRows, *, most_history: int, empty: Allocate = empty_array) -> SplitUsers:
    """The examples of ordered rows: a user's training rows that count, its rows held out, the history of each.

    Args:
        rows: the rows.
        most_history: items of a history at most.
        empty: makes the arrays of the examples.

    Raises:
        ValueError: masks of another length, or ends that are not those of the order.
    """
    train, test, items = (np.empty(len(rows.ends), dtype=np.int64) for _ in range(3))
    held = (rows.order, rows.ends, rows.test, rows.within, rows.positive)
    bound = 2**63 if rows.bound is None else rows.bound
    _rows.count_examples(*held, bound, train, test, items)

    def arrays(size: int) -> tuple[Array, Array, Array, Array]:
        return empty(size, np.uint32), empty(size, np.int64), empty(size, np.int64), empty(size, np.int32)

    of_train, of_test = arrays(int(train.sum())), arrays(int(test.sum()))
    item_rows = empty(int(items.sum()), np.uint32)
    _rows.fill_examples(*held, train, most_history, of_train, of_test, item_rows)
    return SplitUsers(Examples(*of_train), Examples(*of_test), item_rows, train, test, items)


def return_memory_at_once() -> None:
    """Let the C library give freed memory back to the system, for the rest of the process; slower. glibc alone."""
    _rows.return_memory_at_once()


def gather(values: Array, rows: Array, out: Array, *, column: int = 0) -> None:
    """out[:, column] = values[rows].

    Args:
        values: [n], of 1, 4 or 8 bytes an entry.
        rows: uint32 [m], places of `values`.
        out: [m] or [m, columns], of the width of `values`; changed.
        column: which column of `out`.

    Raises:
        ValueError: a place that `values` lacks, or arrays that do not fit.
    """
    width = 1 if out.ndim == 1 else out.shape[1]
    _rows.gather(values, rows, out.reshape(-1), width, column)


@dataclass(frozen=True, slots=True)
class Integers:
    """n integers as Arrow lays them out.

    values: int32 or int64 [n].
    valid: bits, anything with the buffer protocol, 0 where a value is missing; None: none is.
    offset: the bit of the first value.
    """

    values: Array
    valid: Any
    offset: int

    def range(self) -> tuple[int, int]:
        """The least and the greatest; where there is none the first is greater.

        Raises:
            ValueError: there are fewer bits than values.
        """
        return _rows.range_of_integers(self.values, self.valid, self.offset)

    def look_up(self, first: int, table: Array) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """table[value - first] for each value, and for a missing one the last entry.

        Args:
            first: the integer of the table's first entry.
            table: float32 [m].

        Raises:
            ValueError: a value has no entry, or there are fewer bits than values.
        """
        out = np.empty(len(self.values), dtype=np.float32)
        _rows.look_up(self.values, self.valid, self.offset, first, table, out)
        return out


def best_of_rows(scores: Array, k: int) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], list[int]]:
    """The indices of the `k` greatest of each row, best first, equal ones by their index.

    Args:
        scores: float32 [B, n], contiguous. Minus infinity and what is no number are left out.
        k: at least 0.

    Returns:
        Indices, int64 [B, min(k, n)], and how many of each row of these count.
    """
    rows, n = scores.shape
    indices, counts = np.empty((rows, min(k, n)), dtype=np.int64), np.empty(rows, dtype=np.int64)
    _rows.best_of_rows(scores, indices, counts)
    return indices, counts.tolist()
