"""A name for one attempt to train together, agreed upon through the store of torchrun.

torchrun keeps one store for all its attempts: after a restart it still holds the addresses of processes that are gone,
and ranks that read them do not find each other. So every attempt keeps its keys under a name of its own. Counters that
each process has would differ between hosts, so rank 0 makes the name, and tells it to processes that show to be alive.
"""

from __future__ import annotations

import time
import uuid
from typing import Protocol

from lazydp.components.shared.errors import UnavailableError

_POLL_SECONDS = 0.02


class Store(Protocol):
    """What is needed of a store of `torch.distributed`."""

    def set(self, key: str, value: str) -> None:
        """Keep a value."""
        ...

    def get(self, key: str) -> bytes:
        """A value that is there."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        ...


def attempt_name(store: Store, *, rank: int, size: int, wait_seconds: float) -> str:
    """The name of the attempt that this process takes part in, the same on every rank.

    Rank 0 answers whoever it finds; an answer to a process that is gone is read by nobody.

    Raises:
        UnavailableError: the others do not come in time.
    """
    end = time.monotonic() + wait_seconds
    own = uuid.uuid4().hex
    if rank:
        store.set(f"lazydp/here/{rank}", own)
        _await(store, [f"lazydp/answer/{own}"], end)
        name = store.get(f"lazydp/answer/{own}").decode()
        store.set(f"lazydp/joined/{name}/{rank}", own)
        return name
    joined = [f"lazydp/joined/{own}/{other}" for other in range(1, size)]
    while joined and not store.check(joined):
        for other in range(1, size):
            if store.check([f"lazydp/here/{other}"]):
                store.set(f"lazydp/answer/{store.get(f'lazydp/here/{other}').decode()}", own)
        _sleep_until(end)
    return own


def _await(store: Store, keys: list[str], end: float) -> None:
    while not store.check(keys):
        _sleep_until(end)


def _sleep_until(end: float) -> None:
    if time.monotonic() > end:
        raise UnavailableError("the ranks of this run do not find each other: some did not start in time")
    time.sleep(_POLL_SECONDS)
