"""Hashes, codes and the order of rows against plain tellings of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazydp.components.features.values import integers_of
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


def levels() -> list[str]:
    """The instruction sets that this machine runs."""

    def runs(level: str) -> bool:
        try:
            rows.hashed_codes(texts([]), key=b"", person=b"", buckets=1, level=level)
        except ValueError:
            return False
        return True

    return [level for level in ("portable", "avx2", "avx512") if runs(level)]


@pytest.mark.parametrize("level", ["", *levels()])
@given(values=TEXTS, key=st.binary(max_size=64), buckets=st.integers(1, 2**40))
def test_hashed_codes_are_those_of_hashlib(level: str, values: list[str], key: bytes, buckets: int) -> None:
    # Around the size of a block: 128 bytes. Texts of one block are hashed several at a time.
    values = [*values, "x" * 127, "x" * 128, "x" * 129, "x" * 256, "x" * 257, "", *(f"text {n}" for n in range(9)), "a"]
    found = rows.hashed_codes(texts(values), key=key, person=b"lazydp.vocab", buckets=buckets, level=level)
    digests = [hashlib.blake2b(v.encode(), digest_size=8, key=key, person=b"lazydp.vocab").digest() for v in values]
    assert found.tolist() == [1 + int.from_bytes(digest, "little") % buckets for digest in digests]


def test_a_level_that_is_none_is_refused() -> None:
    assert "portable" in levels()
    with pytest.raises(ValueError, match="expected portable, avx2 or avx512"):
        rows.hashed_codes(texts([]), key=b"", person=b"", buckets=1, level="sse9")


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


ROW = st.tuples(st.sampled_from([0, 1, 5, 2**63, 2**64 - 1]), st.integers(-2, 2), st.integers(0, 2), WORDS)


@given(st.lists(ROW, max_size=60), st.booleans(), st.booleans())
def test_rows_are_ordered_as_by_a_sort_of_tuples(
    log: list[tuple[int, int, int, int]], timed: bool, parted: bool
) -> None:
    group, time, part, content = ([row[n] for row in log] for n in range(4))
    times = np.array(time, dtype=np.int64) if timed else None
    parts = np.array(part, dtype=np.float64) if parted else None
    hashes, contents = (np.array(column, dtype=np.uint64) for column in (group, content))
    order = rows.order_rows(hashes, time=times, part=parts, content=contents)

    def key(row: int) -> tuple[Any, ...]:
        return group[row], time[row] * timed, part[row] * parted, content[row], row

    assert order.tolist() == sorted(range(len(log)), key=key)


@given(st.lists(st.tuples(st.sampled_from([0, 1, 5, 2**63, 2**64 - 1]), st.sampled_from(["", "a", "b", "ab"]))))
def test_users_are_numbered_by_hash_and_text(log: list[tuple[int, str]]) -> None:
    """Users may share a hash: then their texts decide."""
    check_numbers(log)


def test_many_users_are_numbered_also_where_all_share_a_hash() -> None:
    """A table that grows finds users of different hashes; one that would have to be searched through gives way."""
    named = [f"user {number % 3000}" for number in range(9000)]
    check_numbers([(text_hash(name), name) for name in named])
    check_numbers([(7, name) for name in named])


def check_numbers(log: list[tuple[int, str]]) -> None:
    """Compare numbers with the places of a sort of (hash, text)."""
    hashes = np.array([word for word, _ in log], dtype=np.uint64)
    numbers, firsts = rows.number_users(hashes, texts([name for _, name in log]))
    distinct = sorted(set(log))
    assert [distinct[number] for number in numbers.tolist()] == log
    assert [log[first] for first in firsts.tolist()] == distinct
    assert all(log.index(log[first]) == first for first in firsts.tolist()[:50])


def test_many_rows_of_few_groups_are_ordered() -> None:
    generator = np.random.default_rng(0)
    group = generator.choice(generator.integers(0, 2**64, 7, dtype=np.uint64), 20_000)
    time = generator.integers(0, 10**9, 20_000)
    assert (rows.order_rows(group, time=time) == np.lexsort((time, group))).all()


def test_many_numbers_are_hashed_as_few_are() -> None:
    """With many, those that stood a little before are not written out anew."""
    many = np.random.default_rng(0).integers(-50, 10**6, 50_000) ** 3
    found = rows.hash_decimals(many)
    assert found[::997].tolist() == [text_hash(str(number)) for number in many[::997].tolist()]
    again = np.concatenate([rows.hash_decimals(part) for part in np.array_split(many, 10)])
    assert (found == again).all()


@given(st.lists(st.tuples(st.integers(0, 4), WORDS), max_size=40), st.booleans())
def test_sums_are_over_the_words_that_entries_name(pairs: list[tuple[int, int]], chained: bool) -> None:
    firsts = np.array([3, 5, 2**64 - 1, 0, 7], dtype=np.uint64)
    entries = np.array([entry for entry, _ in pairs], dtype=np.int32)
    seconds = np.array([word for _, word in pairs], dtype=np.uint64)
    words = firsts[entries]
    if chained:
        words = np.array(
            [mix(one ^ mix(two)) for one, two in zip(words.tolist(), seconds.tolist(), strict=True)], np.uint64
        )
    assert rows.sums_of_pairs(entries, firsts, seconds if chained else None) == rows.sums(words)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60), st.integers(1, 9), st.booleans())
def test_rows_are_parted_by_the_hashes_of_their_users(log: list[tuple[int, bool]], parts: int, masked: bool) -> None:
    hashes = np.array([0, 2**64 - 1, 2**63, 2**63, 2**62, 12345 << 40], dtype=np.uint64)
    entries = np.array([entry for entry, _ in log], dtype=np.int32)
    mask = np.array([taken for _, taken in log], dtype=bool) if masked else None
    found = rows.part_by_user(entries, hashes, parts, accepted=mask)
    taken = [row for row in range(len(log)) if mask is None or mask[row]]
    part_of = [(int(word) >> 32) * parts >> 32 for word in hashes]
    assert found.rows.tolist() == sorted(taken, key=lambda row: part_of[log[row][0]])
    begin = first = 0
    for number, (end, last) in enumerate(zip(found.ends.tolist(), found.user_ends.tolist(), strict=True)):
        users = found.users[first:last]
        assert len(set(users.tolist())) == len(users)
        assert {part_of[user] for user in users.tolist()} <= {number}
        assert users[found.local[begin:end]].tolist() == entries[found.rows[begin:end]].tolist()
        begin, first = end, last
    assert (begin, first) == (len(taken), len({log[row][0] for row in taken}))


TIMES = st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1))


@given(st.lists(st.tuples(st.integers(0, 3), TIMES), max_size=80), st.booleans())
def test_rows_are_ordered_by_user_and_time(log: list[tuple[int, int]], timed: bool) -> None:
    users = np.array([user for user, _ in log], dtype=np.uint32)
    time = np.array([time for _, time in log], dtype=np.int64) if timed else None
    order, ends, ties = rows.order_by_time(users, 4, time)
    check_order(users, time, order, ends, ties)


@pytest.mark.parametrize(("size", "span"), [(2000, 50), (2000, 2**40), (2000, 2**60), (150_000, 2**50)])
def test_many_rows_of_a_user_are_ordered(size: int, span: int) -> None:
    """By digits of a word, where a word holds a row's time and its place, else by comparing."""
    generator = np.random.default_rng(0)
    users = generator.integers(0, 2, size).astype(np.uint32)
    time = generator.integers(-span, span, size)
    check_order(users, time, *rows.order_by_time(users, 2, time))


def check_order(users: Any, time: Any, order: Any, ends: Any, ties: Any) -> None:
    """Compare an order with a sort by user, time and row."""
    times = np.zeros(len(users), np.int64) if time is None else time
    expected = np.lexsort((np.arange(len(users)), times, users))
    assert (order == expected).all()
    assert ends.tolist() == np.cumsum(np.bincount(users, minlength=len(ends))).tolist()
    same = (users[expected][1:] == users[expected][:-1]) & (times[expected][1:] == times[expected][:-1])
    again, first = np.append(False, same)[: len(users)], np.append(same, False)[: len(users)]
    assert (ties == np.where(again, 2, np.where(first, 1, 0))).all()


def plain_split(log: Any, *, bound: int | None, most: int) -> tuple[list[Any], list[Any], list[int]]:
    """The examples of rows (user, test, within, positive) in order, as (row, user, end, length), and the items."""
    train: list[Any] = []
    test: list[Any] = []
    items: list[int] = []
    for user in sorted({row[0] for row in log}):
        own = [place for place, row in enumerate(log) if row[0] == user]
        may = [place for place in own if not log[place][1] and log[place][2]]
        kept = set(may if bound is None else may[len(may) - min(bound, len(may)) :])
        first = len(items)
        for place in own:
            example = (place, user, len(items), min(len(items) - first, most))
            if log[place][1]:
                test.append(example)
            elif place in kept:
                train.append(example)
            if not log[place][1] and log[place][3]:
                items.append(place)
    return train, test, items


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans(), st.booleans()), max_size=40).map(sorted),
    st.none() | st.integers(0, 4),
    st.integers(0, 3),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_users_are_split_as_row_by_row(log: list[Any], bound: int | None, most: int, masked: tuple[bool, ...]) -> None:
    plain = {1: False, 2: True, 3: True}
    log = [(row[0], *(row[n] if masked[n - 1] else plain[n] for n in plain)) for row in log]
    masks = [np.array([row[n] for row in log], dtype=bool) if masked[n - 1] else None for n in plain]
    # Row numbers are not places: the order is some other one.
    order = np.arange(len(log), dtype=np.uint32)[::-1].copy()
    ends = np.cumsum(np.bincount(np.array([row[0] for row in log], dtype=np.int64), minlength=4))
    found = rows.split_users(
        rows.OrderedRows(order=order, ends=ends, test=masks[0], within=masks[1], positive=masks[2], bound=bound),
        most_history=most,
    )
    train, test, items = plain_split(log, bound=bound, most=most)

    def told(examples: rows.Examples) -> list[Any]:
        columns = (examples.rows, examples.users, examples.history_ends, examples.history_lengths)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def with_rows(examples: list[Any]) -> list[Any]:
        return [(int(order[place]), *rest) for place, *rest in examples]

    assert (told(found.train), told(found.test)) == (with_rows(train), with_rows(test))
    assert found.items.tolist() == [int(order[place]) for place in items]
    for counts, examples in ((found.train_counts, train), (found.test_counts, test)):
        assert counts.tolist() == [sum(example[1] == user for example in examples) for user in range(4)]
    assert found.item_counts.tolist() == [sum(log[place][0] == user for place in items) for user in range(4)]


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.float32, np.int64, np.uint64])
def test_values_are_gathered_into_a_column(dtype: Any) -> None:
    values = np.array([0, 1, 1, 0, 1]).astype(dtype)
    picked = np.array([4, 0, 0], dtype=np.uint32)
    out = np.full((3, 2), 9).astype(dtype)
    rows.gather(values, picked, out, column=1)
    assert out.tolist() == np.array([[9, 1], [9, 0], [9, 0]]).astype(dtype).tolist()
    one = np.empty(3, dtype)
    rows.gather(values, picked, one)
    assert (one == values[picked]).all()


def uint32(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.uint32)


@given(st.lists(st.one_of(st.none(), st.integers(-5, 90)), max_size=40), st.integers(0, 9), st.booleans())
def test_integers_are_looked_up(values: list[int | None], skipped: int, narrow: bool) -> None:
    """Whatever bit of its byte the first value has; a missing one is the last entry."""
    array = pa.array([7] * skipped + values, pa.int32() if narrow else pa.int64()).slice(skipped)
    integers = integers_of(array)
    known = [value for value in values if value is not None]
    if not known:
        assert integers.range()[0] > integers.range()[1]
        return
    first, last = integers.range()
    assert (first, last) == (min(known), max(known))
    table = np.append(np.arange(first, last + 1), -99).astype(np.float32)
    assert integers.look_up(first, table).tolist() == [-99 if value is None else value for value in values]


def test_extreme_integers_have_a_range() -> None:
    ends = np.array([-(2**63), 2**63 - 1])
    assert rows.Integers(ends, None, 0).range() == (-(2**63), 2**63 - 1)
    for first, size in ((0, 3), (-(2**63), 2), (2**63 - 1, 1)):
        with pytest.raises(ValueError, match="places of the table"):
            rows.Integers(ends, None, 0).look_up(first, np.zeros(size, np.float32))
    with pytest.raises(ValueError, match="a bit for each value"):
        rows.Integers(np.zeros(9, np.int32), b"\xff", 0).range()


@pytest.mark.parametrize("n", [5, 3_701])
@pytest.mark.parametrize("k", [0, 1, 51, 10_000])
def test_the_best_of_rows_are_ordered_by_score_and_index(n: int, k: int) -> None:
    """Beside ties and what is left out, zeros of both signs, which are equal, and what is no number."""
    generator = np.random.default_rng(n + k)
    scores = generator.integers(-3, 4, (4, n)).astype(np.float32)
    scores[scores == -3] = -np.inf
    scores[scores == 0] *= generator.choice([1.0, -1.0], (scores == 0).sum())
    scores[generator.random((4, n)) < 0.1] = np.nan
    scores[3] = -np.inf
    indices, counts = rows.best_of_rows(scores, k)
    assert indices.shape == (4, min(k, n))
    for row, found, count in zip(scores, indices, counts, strict=True):
        expected = sorted((index for index in range(n) if row[index] > -np.inf), key=lambda i: (-row[i], i))
        assert found[:count].tolist() == expected[:k]


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
        (lambda: rows.best_of_rows(np.zeros((2, 3)), 1), "expected entries of 4 bytes"),
        (lambda: rows.part_by_user(np.array([1], np.int32), np.zeros(1, np.uint64), 1), "numbers of the users named"),
        (lambda: rows.part_by_user(np.array([-1], np.int32), np.zeros(1, np.uint64), 1), "numbers of the users named"),
        (lambda: rows.sums_of_pairs(np.array([2], np.int32), np.zeros(1, np.uint64), None), "users named"),
        (lambda: rows.order_by_time(uint32(0, 2), 2, None), "below that of the users"),
        (lambda: rows.gather(np.zeros(2), uint32(2), np.zeros(1)), "places of values"),
        (lambda: rows.gather(np.zeros(2), uint32(1), np.zeros(1, np.int32)), "expected entries of 8 bytes"),
        (lambda: rows.gather(np.zeros(2), uint32(1), np.zeros((1, 2)), column=2), "less than the width"),
        (
            lambda: rows.split_users(rows.OrderedRows(uint32(0), np.array([2])), most_history=1),
            "ascending places in the order",
        ),
        (
            lambda: rows.split_users(rows.OrderedRows(uint32(0), np.array([1]), np.zeros(2, bool)), most_history=1),
            "expected 1 entries, found 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
