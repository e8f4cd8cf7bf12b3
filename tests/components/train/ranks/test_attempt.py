"""Ranks that start again find each other, though the store still holds what ranks that are gone left there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lazydp.components.shared.errors import UnavailableError
from lazydp.components.train.ranks.attempt import attempt_name

dist: Any = torch.distributed  # its stores are there, and its stubs do not say so


def names(store: Any, ranks: int) -> list[str]:
    """What each rank of an attempt calls it."""
    with ThreadPoolExecutor(ranks) as pool:
        calls = [
            pool.submit(attempt_name, store, rank=rank, size=ranks, wait_seconds=20.0)
            for rank in reversed(range(ranks))
        ]
        return [call.result() for call in calls]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_attempt_has_a_name_of_its_own_that_all_ranks_know(ranks: int) -> None:
    store = dist.HashStore()
    found = [names(store, ranks) for _ in range(3)]
    assert [len(set(attempt)) for attempt in found] == [1, 1, 1]
    assert len({attempt[0] for attempt in found}) == 3


def test_an_attempt_that_ended_before_all_had_come_is_no_obstacle() -> None:
    store = dist.HashStore()
    for rank in (0, 1):
        with pytest.raises(UnavailableError, match="some did not start in time"):
            attempt_name(store, rank=rank, size=3, wait_seconds=0.05)
    assert len(set(names(store, 3))) == 1


def test_the_store_keeps_what_ranks_left_there() -> None:
    """The control: without names of their own, a later attempt reads the addresses of an earlier one."""
    store = dist.HashStore()
    store.set("address of rank 1", "gone")
    assert store.check(["address of rank 1"])
    first, second = (dist.PrefixStore(names(store, 2)[0], store) for _ in range(2))
    first.set("address of rank 1", "gone")
    assert not second.check(["address of rank 1"])
