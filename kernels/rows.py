"""Hashes, codes and the order of rows: C++ on numpy arrays, behind `lazydp.kernels._rows`.

Loads no torch: reading a log has no use for it. Arrays are contiguous. Every function lets other threads run, and
depends on its arguments alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lazydp.kernels import _rows

Array: TypeAlias = np.ndarray[Any, Any]
Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]
Rows: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]


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


def hashed_codes(texts: Texts, *, key: bytes, person: bytes, buckets: int) -> Rows:
    """Codes 1..buckets: BLAKE2b (RFC 7693) of 8 bytes, keyed, little-endian, modulo `buckets`, plus 1.

    Raises:
        ValueError: no bucket, a key over 64 bytes or a person over 16.
    """
    codes = np.empty(len(texts), dtype=np.int64)
    _rows.hashed_codes(key, person, buckets, texts.data, texts.offsets, codes)
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
    _rows.order_rows(group, time, part, content, None, None, order, None)
    return order


def order_by_user(
    hashes: Words, users: Texts, *, time: Array | None, part: Array | None, content: Words
) -> tuple[Rows, np.ndarray[Any, np.dtype[np.bool_]]]:
    """The rows by (hash, text) of the user, then as `order_rows`.

    Args:
        hashes: of the users, uint64 [n]; users may agree in them.
        users: their texts [n].
        time: int64 [n]; None where rows have none.
        part: float64 [n], of a time; None where there is none.
        content: uint64 [n].

    Returns:
        The rows, int64 [n], and for each place whether another user begins there, bool [n].
    """
    order = np.empty(len(hashes), dtype=np.int64)
    starts = np.empty(len(hashes), dtype=np.uint8)
    _rows.order_rows(hashes, time, part, content, users.data, users.offsets, order, starts)
    return order, starts.view(np.bool_)
