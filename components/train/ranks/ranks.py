"""The processes that train one model together: ranks 0 .. W - 1. What they send each other goes through this interface.

`Alone` is the one process of a run that is not distributed; `process_group.ProcessGroup` is one of several. A step is
written once, against `Ranks`: with one rank everything that is sent stays where it is.

Every method but `check_together` is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lazydp.components.shared.errors import PrivacyError


@dataclass
class Traffic:
    """What this rank sent to other ranks.

    Attributes:
        messages: by purpose; one for each rank that is sent to.
        bytes: by purpose, payload alone.
    """

    messages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, purpose: str, *, messages: int, sent: int) -> None:
        """Count one collective."""
        self.messages[purpose] += messages
        self.bytes[purpose] += sent


class Ranks(Protocol):
    """This process among those that train together.

    Attributes:
        rank: of this process.
        size: W.
        traffic: what was sent so far.
    """

    rank: int
    size: int
    traffic: Traffic

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], *, purpose: str) -> list[Tensor]:
        """Send `parts[r]` to rank r, and return what the ranks sent here, in their order.

        Args:
            parts: W tensors of one dimension and one type.
            sizes: elements that each rank sends here.
            purpose: under which the traffic is counted.
        """
        ...

    def gather(self, own: Tensor, *, purpose: str) -> list[Tensor]:
        """The tensor of every rank, in their order; all have the size and type of `own`."""
        ...

    def tell(self, document: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """What rank 0 gives as `document`, a JSON object, on every rank; the others give None."""
        ...

    def check_together(self, what: str) -> None:
        """Wait until every rank is here.

        Raises:
            UnavailableError: some are not in time; the message names them.
        """
        ...

    def another(self) -> Ranks:
        """The same processes, with messages of their own: for a thread beside the one that trains."""
        ...


class Alone:
    """One process that trains by itself."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.traffic = Traffic()

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], *, purpose: str) -> list[Tensor]:
        """What it sends itself."""
        return list(parts)

    def gather(self, own: Tensor, *, purpose: str) -> list[Tensor]:
        """Its own."""
        return [own]

    def tell(self, document: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Its own."""
        assert document is not None
        return document

    def check_together(self, what: str) -> None:
        """There is nobody to wait for."""

    def another(self) -> Alone:
        """Itself again."""
        return Alone()


def tree(parts: Sequence[Tensor]) -> Tensor:
    """The sum of a power of two of tensors, added by a fixed binary tree: neighbours first.

    Which of two neighbouring halves of the tree is summed where, in one process or in two, changes no bit.
    """
    while len(parts) > 1:
        parts = [one + other for one, other in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def tree_sum(ranks: Ranks, values: Tensor, *, purpose: str) -> Tensor:
    """The sum of `values`, float64 [N], over all ranks, added by `tree`; the same bits on every rank.

    Each rank adds one part for all, and all gather the parts.
    """
    size = -(-values.numel() // ranks.size)
    padded = torch.cat([values, values.new_zeros(size * ranks.size - values.numel())])
    parts = ranks.exchange(torch.split(padded, size), [size] * ranks.size, purpose=purpose)
    return torch.cat(ranks.gather(tree(parts), purpose=purpose))[: values.numel()]


def most(ranks: Ranks, own: Tensor, *, purpose: str) -> Tensor:
    """The largest of each element over all ranks."""
    found, *others = ranks.gather(own, purpose=purpose)
    for other in others:
        found = found.maximum(other)
    return found


def check_equal(ranks: Ranks, own: Tensor, what: str) -> None:
    """Refuse to go on where ranks that must hold the same differ.

    Args:
        ranks: all of them.
        own: what this rank holds, or a digest of it.
        what: it is, for the message.

    Raises:
        PrivacyError: some hold something else than rank 0; the message names them.
    """
    first, *others = ranks.gather(own, purpose="checks")
    different = [str(rank) for rank, other in enumerate(others, 1) if not bool((first == other).all())]
    if different:
        raise PrivacyError(
            f"rank {', '.join(different)} of {ranks.size} has another {what} than rank 0: the ranks did not do the "
            "same steps, and nothing is kept of them. Let all ranks run the same lazydp and torch on the same kind of "
            "processor, with the same OMP_NUM_THREADS, and go on from the last checkpoint"
        )
