"""Hashes, codes and the order of rows against plain tellings of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazydp.kernels import rows
from lazydp.kernels.rows import Texts

WORDS = st.integers(0, 2**64 - 1)
TEXTS = st.lists(st.text(max_size=300) | st.sampled_from(["a", "b", "aa"]), max_size=30)


def texts(values: list[str], dtype: Any = np.int32) -> Texts:
    encoded = [value.encode() for value in values]
    # The first text does not begin at 0: arrays may be slices of others.
    offsets = np.cumsum([3, *map(len, encoded)]).astype(dtype)
    return Texts(b"xyz" + b"".join(encoded), offsets)


def mix(word: int) -> int:
    """The finaliser of SplitMix64."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def text_hash(value: str) -> int:
    content = value.encode()
    total = sum(mix(byte ^ mix(place)) for place, byte in enumerate(content)) % 2**64
    return mix(total ^ mix(len(content)))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@given(values=TEXTS)
def test_texts_are_hashed_byte_by_byte(dtype: Any, values: list[str]) -> None:
    assert rows.hash_texts(texts(values, dtype)).tolist() == [text_hash(value) for value in values]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_a_number_is_hashed_as_its_digits(values: list[int]) -> None:
    found = rows.hash_decimals(np.array(values, dtype=np.int64))
    assert found.tolist() == [text_hash(str(value)) for value in values]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint8, np.uint64, np.bool_])
@pytest.mark.parametrize("without_zeros", [False, True])
def test_columns_are_chained(dtype: Any, without_zeros: bool) -> None:
    values = np.array([0.0, -0.0, 1.5, 2.0] if np.dtype(dtype).kind == "f" else [0, 0, 1, 2]).astype(dtype)
    plain = values.astype(np.float64) + 0.0 if values.dtype.kind == "f" else values.astype(np.int64)
    hashes = np.array([1, 2, 3, 2**64 - 1], dtype=np.uint64)
    words = plain.view(np.uint64).tolist()
    pairs = zip(hashes.tolist(), words, strict=True)
    expected = [one if without_zeros and not word else mix(one ^ mix(word)) for one, word in pairs]
    rows.chain(hashes, values, without_zeros=without_zeros)
    assert hashes.tolist() == expected


def test_sums_are_modulo_two_to_the_64() -> None:
    words = np.array([0, 1, 2**64 - 1] * 5, dtype=np.uint64)
    expected = tuple(sum(mix(word ^ lane) for word in words.tolist()) % 2**64 for lane in (0, 1))
    assert rows.sums(words) == expected


@given(TEXTS, st.binary(max_size=64), st.integers(1, 2**40))
def test_hashed_codes_are_those_of_hashlib(values: list[str], key: bytes, buckets: int) -> None:
    # Around the size of a block: 128 bytes.
    values = [*values, "x" * 127, "x" * 128, "x" * 129, "x" * 256, "x" * 257, ""]
    found = rows.hashed_codes(texts(values), key=key, person=b"lazydp.vocab", buckets=buckets)
    digests = [hashlib.blake2b(v.encode(), digest_size=8, key=key, person=b"lazydp.vocab").digest() for v in values]
    assert found.tolist() == [1 + int.from_bytes(digest, "little") % buckets for digest in digests]


@given(st.lists(st.text(max_size=20), unique=True, max_size=40), TEXTS)
def test_texts_are_found_in_a_list(known: list[str], asked: list[str]) -> None:
    places = {value: place for place, value in enumerate(known, start=1)}
    asked += known
    found = rows.TextIndex(texts(known)).find(texts(asked, np.int64))
    assert found.tolist() == [places.get(value, 0) for value in asked]


@given(st.lists(WORDS, max_size=50), st.integers(1, 9))
def test_parts_are_ranges_of_hashes(hashes: list[int], parts: int) -> None:
    order, ends = rows.order_by_part(np.array(hashes, dtype=np.uint64), parts)
    part_of = [(word >> 32) * parts >> 32 for word in hashes]
    assert order.tolist() == sorted(range(len(hashes)), key=lambda row: part_of[row])
    assert ends.tolist() == [sum(part <= number for part in part_of) for number in range(parts)]


ROW = st.tuples(
    st.sampled_from([0, 1, 5, 2**63, 2**64 - 1]), st.sampled_from("abc"), st.integers(-2, 2), st.integers(0, 2), WORDS
)


@given(st.lists(ROW, max_size=60), st.booleans(), st.booleans())
def test_rows_are_ordered_as_by_a_sort_of_tuples(
    log: list[tuple[int, str, int, int, int]], timed: bool, parted: bool
) -> None:
    """Users may share a hash: then their texts decide, and their rows do not mix."""
    group, time, part, content = ([row[0] for row in log], *([row[n] for row in log] for n in (2, 3, 4)))
    names = [row[1] for row in log]
    times = np.array(time, dtype=np.int64) if timed else None
    parts = np.array(part, dtype=np.float64) if parted else None
    hashes, contents = (np.array(column, dtype=np.uint64) for column in (group, content))
    order, starts = rows.order_by_user(hashes, texts(names), time=times, part=parts, content=contents)

    def key(row: int) -> tuple[Any, ...]:
        return group[row], names[row], time[row] * timed, part[row] * parted, content[row], row

    expected = sorted(range(len(log)), key=key)
    assert order.tolist() == expected
    users = [key(row)[:2] for row in expected]
    assert starts.tolist() == [place == 0 or users[place] != users[place - 1] for place in range(len(log))]
    without_users = rows.order_rows(hashes, time=times, part=parts, content=contents)
    assert without_users.tolist() == sorted(range(len(log)), key=lambda row: (key(row)[0], *key(row)[2:]))


def test_many_rows_of_few_groups_are_ordered() -> None:
    generator = np.random.default_rng(0)
    group = generator.choice(generator.integers(0, 2**64, 7, dtype=np.uint64), 20_000)
    time = generator.integers(0, 10**9, 20_000)
    assert (rows.order_rows(group, time=time) == np.lexsort((time, group))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows.hash_texts(Texts(b"abc", np.array([0, 4], dtype=np.int32))), "within the data"),
        (lambda: rows.hash_texts(Texts(b"abc", np.array([2, 1], dtype=np.int32))), "ascending"),
        (lambda: rows.chain(np.zeros(2, np.uint64), np.zeros(3)), "expected 2 entries, found 3"),
        (lambda: rows.chain(np.zeros(1, np.uint64), np.zeros(1, np.int16)), "expected float32"),
        (lambda: rows.hashed_codes(texts(["a"]), key=b"", person=b"", buckets=0), "at least 1"),
        (lambda: rows.hashed_codes(texts(["a"]), key=b"k" * 65, person=b"", buckets=1), "at most 64"),
        (lambda: rows.order_rows(np.zeros(2, np.uint64), time=np.zeros(1, np.int64)), "expected 2 entries"),
        (lambda: rows.order_by_part(np.zeros(2, np.uint64), 0), "parts"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
