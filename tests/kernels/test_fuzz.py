"""Wrong arguments give a ValueError that names the place and the value; never a crash, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

KEY = NoiseKey.for_tests(7).tensor()
ONE = torch.ones(1, 1)
ANY_INT = st.one_of(st.integers(-3, 12), st.sampled_from([-(2**63), -(2**31), 2**31, 2**63 - 1]))


def int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def offsets_are_sound(offsets: list[int], count: int) -> bool:
    return bool(offsets) and offsets[0] == 0 and offsets[-1] == count and sorted(offsets) == offsets


@settings(deadline=None, max_examples=300)
@given(indices=st.lists(ANY_INT, max_size=8), offsets=st.lists(ANY_INT, max_size=6), num_rows=st.integers(0, 6))
def test_bags(indices: list[int], offsets: list[int], num_rows: int) -> None:
    weight = torch.randn(num_rows, 4)
    sound = all(0 <= i < num_rows for i in indices) and offsets_are_sound(offsets, len(indices))

    def call() -> Tensor:
        return ops.bag_sum(weight, int64(indices), int64(offsets))

    if sound:
        assert call().shape == (len(offsets) - 1, 4)
    else:
        with pytest.raises(ValueError, match="expected"):
            call()


@settings(deadline=None, max_examples=300)
@given(indices=st.lists(ANY_INT, max_size=8), offsets=st.lists(ANY_INT, max_size=7), features=st.integers(0, 3))
def test_norms(indices: list[int], offsets: list[int], features: int) -> None:
    grad = torch.randn(features, 2, 4)
    sound = all(0 <= i < 2**63 - 1 for i in indices) and offsets_are_sound(offsets, len(indices))
    sound = sound and len(offsets) == 2 * features + 1

    def call() -> Tensor:
        return ops.bag_sq_norms(int64(indices), int64(offsets), grad)

    if sound:
        assert call().shape == (2,)
    else:
        with pytest.raises(ValueError, match="expected"):
            call()


@settings(deadline=None, max_examples=200)
@given(indices=st.lists(ANY_INT, max_size=8), num_rows=st.integers(-1, 9))
def test_groups(indices: list[int], num_rows: int) -> None:
    if all(0 <= i < num_rows for i in indices):
        assert ops.group_rows(int64(indices), num_rows=num_rows).order.numel() == len(indices)
    else:
        with pytest.raises(ValueError, match=r"indices\[\d\]: expected 0 <= index"):
            ops.group_rows(int64(indices), num_rows=num_rows)


@settings(deadline=None, max_examples=300)
@given(rows=st.lists(ANY_INT, max_size=6), last=st.lists(st.integers(-2, 6), min_size=5, max_size=5))
def test_catch_up_writes_nothing_unless_all_is_sound(rows: list[int], last: list[int]) -> None:
    weight, before = torch.ones(5, 4), torch.tensor(last, dtype=torch.int32)
    now = before.clone()
    transition = torch.full((3, 1), 2.0)
    sound = all(0 <= r < 5 for r in rows) and sorted(set(rows)) == rows
    sound = sound and all(last[r] in (0, 1, 2, 4) for r in rows)  # a start below 3, or the step itself

    def call() -> None:
        ops.catch_up_(weight, now, int64(rows), KEY, table=0, step=4, transition=transition, factor=transition)

    if sound:
        call()
        assert all(now[r] == 4 for r in rows)
    else:
        with pytest.raises(ValueError, match=r"expected|starting steps"):
            call()
        assert torch.equal(weight, torch.ones(5, 4))
        assert torch.equal(now, before)


@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(ANY_INT, max_size=4),
    order=st.lists(ANY_INT, max_size=4),
    starts=st.lists(ANY_INT, max_size=5),
    bags=st.lists(ANY_INT, max_size=4),
)
def test_scatter(rows: list[int], order: list[int], starts: list[int], bags: list[int]) -> None:
    weight = torch.zeros(5, 4)
    groups = ops.RowGroups(int64(rows), int64(order), int64(starts))
    sound = all(0 <= r < 5 for r in rows) and sorted(set(rows)) == rows
    sound = sound and all(0 <= i < len(order) for i in order) and len(bags) == len(order)
    sound = sound and offsets_are_sound(starts, len(order)) and len(starts) == len(rows) + 1
    sound = sound and all(0 <= b < 3 for b in bags)

    def call() -> None:
        ops.scatter_add_(weight, groups, int64(bags), torch.ones(3, 4), torch.ones(3), alpha=1.0)

    if sound:
        call()
    else:
        with pytest.raises(ValueError, match="expected"):
            call()
        assert not weight.any()


def catch_up(**changes: object) -> Callable[[], None]:
    arguments: dict[str, object] = {
        "weight": torch.zeros(4, 4),
        "last": torch.zeros(4, dtype=torch.int32),
        "rows": int64([1, 2]),
        "key": KEY,
        "table": 0,
        "step": 1,
        "transition": ONE,
        "factor": ONE,
    }
    return lambda: ops.catch_up_(**(arguments | changes))  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "weight of another dtype": (catch_up(weight=torch.zeros(4, 4, dtype=torch.float64)), "weight: expected float32"),
    "bfloat16 weight": (catch_up(weight=torch.zeros(4, 4, dtype=torch.bfloat16)), "weight: expected float32"),
    "weight not contiguous": (catch_up(weight=torch.zeros(4, 4).T[1:, :2]), "weight: expected a contiguous tensor"),
    "weight of one dimension": (catch_up(weight=torch.zeros(4)), r"weight: expected 2 dimension\(s\), found 1"),
    "last of another length": (catch_up(last=torch.zeros(3, dtype=torch.int32)), "last: expected size 4"),
    "last of another dtype": (catch_up(last=torch.zeros(4, dtype=torch.int64)), "last: expected int32"),
    "rows of another dtype": (catch_up(rows=torch.zeros(2, dtype=torch.int32)), "rows: expected int64"),
    "rows twice": (catch_up(rows=int64([1, 1])), r"rows\[1\]: expected more than 1"),
    "key too short": (catch_up(key=torch.ones(16, dtype=torch.uint8)), "key: expected size 32"),
    "key destroyed": (catch_up(key=torch.zeros(32, dtype=torch.uint8)), "key: all bytes are zero"),
    "table of keystreams": (catch_up(table=0xFFFF), "table: expected 0 <= table < 65535, found 65535"),
    "table negative": (catch_up(table=-1), "table: expected"),
    "step negative": (catch_up(step=-1), "step: expected"),
    "step too large": (catch_up(step=2**31), "step: expected"),
    "transition of momentum alone": (catch_up(transition=torch.ones(1, 4)), "transition: expected size 1"),
    "factor of another length": (catch_up(factor=torch.ones(2, 1)), "factor: expected size 1"),
    "momentum of another shape": (
        catch_up(momentum=torch.zeros(4, 3), transition=torch.ones(1, 4), factor=torch.ones(1, 3)),
        "momentum: expected size 4",
    ),
    "row from the future": (catch_up(last=torch.full((4,), 2, dtype=torch.int32)), r"last\[1\]: expected"),
    "unknown distribution": (catch_up(noise="zeros"), "noise: expected 'gaussian' or 'ones'"),
    "row numbers too large": (
        lambda: ops.normal_(torch.empty(2, 2), KEY, table=0, first_row=2**48 - 1, step=0),
        "first_row: expected",
    ),
    "meta tensor": (
        lambda: ops.bag_sum(torch.zeros(2, 2), int64([0]), int64([0, 1]), torch.ones(2)),
        "per_lookup_weights: expected size 1",
    ),
    "offsets without entries": (
        lambda: ops.bag_sum(torch.zeros(2, 2), int64([]), int64([])),
        "offsets: expected at least one entry",
    ),
    "catch-up for bags without offsets": (
        lambda: ops.catch_up_bag_sum_(
            torch.zeros(2, 2),
            torch.zeros(2, dtype=torch.int32),
            ops.group_rows(int64([]), num_rows=2),
            KEY,
            int64([]),
            int64([]),
            int64([]),
            table=0,
            step=1,
            transition=ONE,
            factor=ONE,
        ),
        "offsets: expected at least one entry",
    ),
    "bag_ids of falling offsets": (lambda: ops.bag_ids(int64([0, 2, 1])), r"offsets\[2\]: expected at least 2"),
    "keystream past its end": (
        lambda: ops.chacha_words(KEY, stream=0, counter=2**32 - 1, n=17),
        "counter: expected",
    ),
    "keystream of negative length": (lambda: ops.chacha_words(KEY, stream=0, counter=0, n=-1), "n: expected n >= 0"),
    "negative stream": (lambda: ops.chacha_words(KEY, stream=-1, counter=0, n=1), "stream: expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_message_says_what_was_expected(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_to_do_is_no_error() -> None:
    empty = torch.empty(0, 4)
    last = torch.empty(0, dtype=torch.int32)
    ops.normal_(empty, KEY, table=0, first_row=0, step=0)
    ops.flush_(empty, last, KEY, table=0, step=1, transition=ONE, factor=ONE)
    ops.catch_up_(empty, last, int64([]), KEY, table=0, step=1, transition=ONE, factor=ONE)
    assert ops.bag_sum(empty, int64([]), int64([0, 0, 0])).tolist() == [[0.0] * 4] * 2
    assert ops.bag_sq_norms(int64([]), int64([0, 0]), torch.ones(1, 1, 4)).tolist() == [0.0]
    groups = ops.group_rows(int64([]), num_rows=0)
    assert groups.starts.tolist() == [0]
    ops.scatter_add_(empty, groups, int64([]), torch.empty(0, 4), torch.empty(0), alpha=1.0)
    ops.flush_(torch.empty(3, 0), torch.zeros(3, dtype=torch.int32), KEY, table=0, step=1, transition=ONE, factor=ONE)
