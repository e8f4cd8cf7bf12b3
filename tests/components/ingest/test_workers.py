"""Work on several cores: results in order, few held, errors told."""

import threading
from collections.abc import Iterator

import pytest

from lazydp.components.ingest.workers import cores, in_order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_few_are_held(workers: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(50):
            taken += 1
            yield number

    results = in_order(lambda number: number * number, items(), workers=workers)
    for number, result in enumerate(results):
        assert result == number * number
        assert taken <= number + 1 + workers
    assert taken == 50


def test_several_threads_work_at_once() -> None:
    # Passes only where three calls run at the same time.
    together = threading.Barrier(3, timeout=30)
    assert len(list(in_order(lambda _: together.wait(), range(3), workers=3))) == 3
    assert cores() >= 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_work(workers: int) -> None:
    def fail_at_three(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = in_order(fail_at_three, range(100), workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
