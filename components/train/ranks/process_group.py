"""Ranks as processes of `torch.distributed`: the only module that calls its collectives.

torchrun starts the processes and says by environment variables which is which. Messages go through gloo, between host
memories. They are not encrypted: row numbers, rows and gradients without noise travel in clear, so that the network
between ranks has to be private (docs/distributed.md).
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lazydp.components.shared.errors import UnavailableError
from lazydp.components.train.ranks.attempt import attempt_name
from lazydp.components.train.ranks.launch import launched
from lazydp.components.train.ranks.ranks import Alone, Ranks, Traffic

WAIT_SECONDS = 600
"""How long a rank waits for the others, unless it is told otherwise."""


class ProcessGroup:
    """This process among W that `torch.distributed` knows.

    Args:
        group: of `torch.distributed`; it must belong to gloo.
        wait: how long to wait for other ranks.
    """

    def __init__(self, group: dist.ProcessGroup, *, wait: datetime.timedelta) -> None:
        self._group = group
        self._wait = wait
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.traffic = Traffic()

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], *, purpose: str) -> list[Tensor]:
        """See `Ranks.exchange`: an all-to-all."""
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(sizes))
        with self._named(purpose):
            dist.all_to_all_single(received, sent, list(sizes), [part.numel() for part in parts], group=self._group)
        self._count(purpose, sent.numel() - parts[self.rank].numel(), sent)
        return list(torch.split(received, list(sizes)))

    def gather(self, own: Tensor, *, purpose: str) -> list[Tensor]:
        """See `Ranks.gather`: an all-gather."""
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._named(purpose):
            dist.all_gather(found, own, group=self._group)
        self._count(purpose, own.numel() * (self.size - 1), own)
        return found

    def tell(self, document: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """See `Ranks.tell`: two broadcasts, of the length and of the text."""
        text = b"" if document is None else json.dumps(document).encode()
        length = torch.tensor([len(text)])
        with self._named("messages"):
            dist.broadcast(length, group_src=0, group=self._group)
            content = torch.frombuffer(bytearray(text or bytes(int(length))), dtype=torch.uint8)
            dist.broadcast(content, group_src=0, group=self._group)
        if self.rank == 0:
            self._count("messages", content.numel() * (self.size - 1), content)
        told: Mapping[str, Any] = json.loads(content.numpy().tobytes())
        return told

    def check_together(self, what: str) -> None:
        """See `Ranks.check_together`."""
        with self._named(what):
            dist.monitored_barrier(group=self._group, timeout=self._wait, wait_all_ranks=True)

    def another(self) -> ProcessGroup:
        """See `Ranks.another`."""
        return ProcessGroup(dist.new_group(backend="gloo", timeout=self._wait), wait=self._wait)

    def _count(self, purpose: str, elements: int, of: Tensor) -> None:
        self.traffic.add(purpose, messages=self.size - 1, sent=elements * of.element_size())

    @contextlib.contextmanager
    def _named(self, purpose: str) -> Iterator[None]:
        """Say in one line what failed. The backend names a rank that is gone, or that does not come in time."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UnavailableError(
                f"rank {self.rank} of {self.size} cannot go on ({purpose}): another rank ended, or did not come within "
                f"{self._wait.total_seconds():g} s: {reason}. Start all ranks again: they go on from the last "
                "checkpoint"
            ) from error


@contextlib.contextmanager
def joined(*, wait_seconds: float = WAIT_SECONDS) -> Iterator[Ranks]:
    """This process among those that torchrun started, or alone where it started none.

    Raises:
        UnavailableError: the other ranks do not answer.
    """
    if not launched():
        yield Alone()
        return
    wait = datetime.timedelta(seconds=wait_seconds)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))  # type: ignore[attr-defined]
        name = attempt_name(store, rank=rank, size=size, wait_seconds=wait_seconds)
        own = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise UnavailableError(f"the ranks of this run do not find each other: {error}") from error
    try:
        group = dist.group.WORLD
        assert group is not None
        yield ProcessGroup(group, wait=wait)
    finally:
        dist.destroy_process_group()
