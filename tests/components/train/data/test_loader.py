"""Prefetching keeps the order, passes errors on, and ends when its user does."""

import threading
import time

import pytest

from lazydp.components.train.data.loader import Prefetcher


def running() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def test_batches_come_in_order() -> None:
    with Prefetcher(lambda step: step * step, first=3, last=40, depth=2) as batches:
        assert list(batches) == [(step, step * step) for step in range(3, 41)]
    assert not running()


def test_nothing_to_do() -> None:
    with Prefetcher(lambda step: step, first=5, last=4) as batches:
        assert list(batches) == []


def test_batches_are_made_ahead_and_not_too_far() -> None:
    made: list[int] = []
    with Prefetcher(lambda step: made.append(step) or step, first=1, last=100, depth=2) as batches:  # type: ignore[func-returns-value]
        for step, _ in batches:
            time.sleep(0.02)
            if step == 3:
                assert 3 < len(made) <= 3 + 2 + 1
                break


def test_an_error_surfaces_at_its_step() -> None:
    def make(step: int) -> int:
        if step == 4:
            raise OSError("disk gone")
        return step

    seen = []  # type: ignore[var-annotated]

    def consume() -> None:
        with Prefetcher(make, first=1, last=10) as batches:
            seen.extend(step for step, _ in batches)

    with pytest.raises(OSError, match="disk gone"):
        consume()
    assert seen == [1, 2, 3]
    assert not running()


def test_leaving_early_stops_the_thread() -> None:
    def interrupted() -> None:
        with Prefetcher(lambda step: step, first=1, last=10**9) as batches:
            for step, _ in batches:
                if step == 2:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not running()
