"""Tables whose rows lie on several ranks: rows are fetched from their owners, and gradients are sent to them.

A step of W ranks, each with its own examples and some places of every table (`ranks/places.py`):

    counts      every rank tells every owner how much it is going to send and ask for
    rows        which rows it reads, and which of its bags read them
    rows        the owner lets the rows catch up, and sends them back
    gradients   the clipped gradients of the bags, each once to each owner of a row that the bag reads

Between the last two each rank pools the rows and does its forward and backward pass. Rows travel, not pooled sums, so
that a bag is summed in one order wherever its rows lie. An owner gets every term that is to be added to a row of its
own, and adds them by the operator that one process uses: exact sums don't depend on the order (`ops.scatter_add_`), and
without a bound the order is that of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lazydp.components.train.ranks.places import shard
from lazydp.components.train.ranks.ranks import Ranks
from lazydp.components.train.tables.embedding_tables import (
    EmbeddingTables,
    GroupedLookups,
    TableGradient,
    grouped,
    pooled,
)
from lazydp.components.train.tables.lookups import Lookups, join
from lazydp.kernels import ops
from lazydp.kernels.arguments import RowGroups

_COUNTS = ("rows", "lookups", "bags", "weights")


class Rows(Protocol):
    """What a step does with the rows of tables; see `EmbeddingTables`, whose rows are all here."""

    def group_rows(self, reads: Sequence[Mapping[str, Lookups]]) -> dict[str, GroupedLookups]:
        """See `EmbeddingTables`."""
        ...

    def catch_up(self, groups: Mapping[str, GroupedLookups]) -> None:
        """See `EmbeddingTables`."""
        ...

    def gather(self, reads: Mapping[str, Lookups]) -> dict[str, Tensor]:
        """See `EmbeddingTables`."""
        ...

    def catch_up_and_gather(
        self, groups: Mapping[str, GroupedLookups], reads: Mapping[str, Lookups]
    ) -> dict[str, Tensor]:
        """See `EmbeddingTables`."""
        ...

    def add_gradient(
        self, groups: Mapping[str, GroupedLookups], gradients: Mapping[str, Sequence[TableGradient]]
    ) -> None:
        """See `EmbeddingTables`."""
        ...


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one rank reads of one table from one owner, in the numbers of the owner.

    Attributes:
        rows: distinct, ascending, int64 [U].
        row_of_lookup: for each lookup the position of its row in `rows`, int64 [N]; in the order of the lookups.
        bag_of_lookup: for each lookup the position of its bag among those that read rows of this owner, int64 [N].
        bags: these bags in the numbers of the rank that reads, int64 [G]; empty where another rank reads.
        lookups: these lookups in the numbers of the rank that reads, int64 [N]; empty where another rank reads.
        num_bags: G.
        weighted: whether the lookups have weights.
    """

    rows: Tensor
    row_of_lookup: Tensor
    bag_of_lookup: Tensor
    bags: Tensor
    lookups: Tensor
    num_bags: int
    weighted: bool

    @classmethod
    def of(cls, group: GroupedLookups | None, places: range) -> _Asked:
        """What of `group`, whose rows are numbered through the whole table, belongs to the owner of `places`."""
        none = torch.empty(0, dtype=torch.int64)
        if group is None:
            return cls(none, none, none, none, none, 0, False)
        first, end = torch.searchsorted(group.rows.rows, torch.tensor([places.start, places.stop])).tolist()
        starts = group.rows.starts[first : end + 1]
        # In the order of the lookups, so that bags ascend and terms are added as one process adds them.
        lookups, by_row = group.rows.order[starts[0] : starts[-1]].sort()
        row = torch.repeat_interleave(torch.arange(end - first), starts.diff())[by_row]
        bags, bag = torch.unique_consecutive(group.bag_of_lookup[lookups], return_inverse=True)
        weighted = group.weights is not None
        return cls(group.rows.rows[first:end] - places.start, row, bag, bags, lookups, len(bags), weighted)

    @classmethod
    def received(cls, numbers: Tensor, counts: Sequence[int]) -> _Asked:
        """What another rank asked for: `numbers` as `sent` makes them, int32."""
        num_rows, num_lookups, num_bags, weighted = counts
        rows, row, bag = torch.split(numbers.long(), [num_rows, num_lookups, num_lookups])
        none = numbers.new_empty(0)
        return cls(rows, row, bag, none, none, num_bags, bool(weighted))

    def counts(self) -> list[int]:
        """In the order of `_COUNTS`."""
        return [len(self.rows), len(self.row_of_lookup), self.num_bags, int(self.weighted)]

    def sent(self) -> Tensor:
        """All numbers, int32 [U + 2 N]."""
        return torch.cat([self.rows, self.row_of_lookup, self.bag_of_lookup]).int()

    def size_of_gradients(self, columns: int) -> int:
        """Numbers that `gradients` sends."""
        return self.num_bags * (columns + 1) + self.weighted * len(self.row_of_lookup)


class RowExchange:
    """The rows of all tables for one rank: its own in `own`, the others on other ranks.

    Args:
        own: the rows of this rank, by `shard`; on the CPU.
        ranks: all ranks.
        num_rows: of each whole table, in the order of `own`.
    """

    def __init__(self, own: EmbeddingTables, ranks: Ranks, num_rows: Mapping[str, int]) -> None:
        self._own = own
        self._ranks = ranks
        self._num_rows = dict(num_rows)
        self._columns = own.columns
        self._places = {
            name: [shard(rows, rank=rank, ranks=ranks.size) for rank in range(ranks.size)]
            for name, rows in num_rows.items()
        }
        # Of the step under way: what this rank asked each owner for, what each rank asks this one for, and the rows.
        self._asked: list[dict[str, _Asked]] = []
        self._wanted: list[dict[str, _Asked]] = []
        self._fetched: dict[str, tuple[Tensor, Tensor]] = {}

    def group_rows(self, reads: Sequence[Mapping[str, Lookups]]) -> dict[str, GroupedLookups]:
        """The distinct rows that the micro-batches of this rank read, numbered through whole tables."""
        return grouped(reads, self._num_rows)

    def catch_up(self, groups: Mapping[str, GroupedLookups]) -> None:
        """Let the owners give the rows of `groups` the noise that they miss, and fetch them."""
        self._asked = [
            {name: _Asked.of(groups.get(name), places[owner]) for name, places in self._places.items()}
            for owner in range(self._ranks.size)
        ]
        self._wanted = self._tell()
        served = self._serve()
        sizes = [self._row_sizes(asked) for asked in self._asked]
        found = self._ranks.exchange(served, [sum(of_rank) for of_rank in sizes], purpose="rows")
        parts = [iter(torch.split(part, of_rank)) for part, of_rank in zip(found, sizes, strict=True)]
        fetched = {
            name: torch.cat([next(part) for part in parts]).view(-1, columns) for name, columns in self._columns.items()
        }
        self._fetched = {name: (group.rows.rows, fetched[name]) for name, group in groups.items()}

    def _tell(self) -> list[dict[str, _Asked]]:
        """Tell the owners what is asked of them, and hear what is asked of this rank."""
        width, names = len(_COUNTS), list(self._places)
        told = [torch.tensor([asked[name].counts() for name in names]).view(-1) for asked in self._asked]
        heard = self._ranks.exchange(told, [width * len(names)] * self._ranks.size, purpose="counts")
        counts = [part.view(-1, width).tolist() for part in heard]
        ids = [torch.cat([of.sent() for of in asked.values()]) for asked in self._asked]
        sizes = [[rows + 2 * lookups for rows, lookups, *_ in of_rank] for of_rank in counts]
        numbers = self._ranks.exchange(ids, [sum(of_rank) for of_rank in sizes], purpose="ids")
        return [
            {
                name: _Asked.received(part, of_table)
                for name, part, of_table in zip(names, torch.split(sent, of_rank), counted, strict=True)
            }
            for sent, of_rank, counted in zip(numbers, sizes, counts, strict=True)
        ]

    def _serve(self) -> list[Tensor]:
        """The rows that each rank asked this one for, flat, after they caught up."""
        reads = {}
        for name in self._columns:
            rows = torch.cat([wanted[name].rows for wanted in self._wanted])
            reads[name] = Lookups(rows, torch.arange(len(rows) + 1), None, 1)
        found = self._own.catch_up_and_gather(self._own.group_rows([reads]), reads)
        parts = {
            name: iter(torch.split(found[name], [len(wanted[name].rows) for wanted in self._wanted]))
            for name in self._columns
        }
        return [torch.cat([next(parts[name]).reshape(-1) for name in self._columns]) for _ in self._wanted]

    def _row_sizes(self, asked: Mapping[str, _Asked]) -> list[int]:
        return [len(asked[name].rows) * columns for name, columns in self._columns.items()]

    def gather(self, reads: Mapping[str, Lookups]) -> dict[str, Tensor]:
        """Pooled rows [F * B, D] of each table, from the rows that `catch_up` fetched."""
        fetched = [self._fetched[name] for name in reads]
        positions = [
            torch.searchsorted(rows, read.indices) for (rows, _), read in zip(fetched, reads.values(), strict=True)
        ]
        return pooled([weight for _, weight in fetched], positions, reads)

    def catch_up_and_gather(
        self, groups: Mapping[str, GroupedLookups], reads: Mapping[str, Lookups]
    ) -> dict[str, Tensor]:
        """`catch_up`, then `gather`."""
        self.catch_up(groups)
        return self.gather(reads)

    def add_gradient(
        self, groups: Mapping[str, GroupedLookups], gradients: Mapping[str, Sequence[TableGradient]]
    ) -> None:
        """Send the gradients of the coming step to the owners of the rows, which add them."""
        ready = {
            name: (join([part.gradient for part in parts]), join([part.scale_of_bags() for part in parts]))
            for name, parts in gradients.items()
        }
        sent = [torch.cat(list(_flat(asked, groups, ready))) for asked in self._asked]
        sizes = [
            [wanted[name].size_of_gradients(columns) for name, columns in self._columns.items()]
            for wanted in self._wanted
        ]
        found = self._ranks.exchange(sent, [sum(of_rank) for of_rank in sizes], purpose="gradients")
        parts = [iter(torch.split(part, of_rank)) for part, of_rank in zip(found, sizes, strict=True)]
        arrived = {
            name: _arrived(
                [(wanted[name], next(part)) for wanted, part in zip(self._wanted, parts, strict=True)], width
            )
            for name, width in self._columns.items()
        }
        self._own.add_gradient(
            self._grouped_by_own_row({name: of for name, (of, _) in arrived.items()}),
            {name: [gradient] for name, (_, gradient) in arrived.items()},
        )
        self._asked, self._wanted, self._fetched = [], [], {}

    def _grouped_by_own_row(self, arrived: Mapping[str, _Terms]) -> dict[str, GroupedLookups]:
        groups: list[RowGroups] = ops.foreach_group_rows(
            [terms.rows for terms in arrived.values()],
            num_rows=[len(self._places[name][self._ranks.rank]) for name in arrived],
        )
        return {
            name: GroupedLookups(group, terms.bag_of_lookup, terms.weights)
            for (name, terms), group in zip(arrived.items(), groups, strict=True)
        }


@dataclass(frozen=True, slots=True)
class _Terms:
    """Lookups of rows of this rank, from all ranks.

    Attributes:
        rows: of each lookup, int64 [N].
        bag_of_lookup: int64 [N], never decreasing; bags count through all ranks.
        weights: float32 [N], or None.
    """

    rows: Tensor
    bag_of_lookup: Tensor
    weights: Tensor | None


def _flat(
    asked: Mapping[str, _Asked], groups: Mapping[str, GroupedLookups], ready: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[Tensor]:
    """What one owner gets of each table: gradients of bags, what they are multiplied by, and weights of lookups."""
    for name, of in asked.items():
        if name not in ready:
            continue
        gradient, scale = ready[name]
        yield gradient[of.bags].view(-1)
        yield scale[of.bags]
        weights = groups[name].weights
        if weights is not None:
            yield weights[of.lookups]
    yield torch.empty(0)


def _arrived(received: Sequence[tuple[_Asked, Tensor]], columns: int) -> tuple[_Terms, TableGradient]:
    """The terms of one table: what each rank asked for, and the numbers that it sent."""
    rows, bags, weights, gradients, scales = [], [], [], [], []
    before = 0
    for asked, numbers in received:
        gradient, scale, of_lookups = torch.split(
            numbers, [asked.num_bags * columns, asked.num_bags, asked.weighted * len(asked.row_of_lookup)]
        )
        rows.append(asked.rows[asked.row_of_lookup])
        bags.append(asked.bag_of_lookup + before)
        weights.append(of_lookups)
        gradients.append(gradient.view(-1, columns))
        scales.append(scale)
        before += asked.num_bags
    weighted = any(asked.weighted for asked, _ in received)
    terms = _Terms(torch.cat(rows), torch.cat(bags), torch.cat(weights) if weighted else None)
    none = Lookups(terms.rows[:0], torch.zeros(before + 1, dtype=torch.int64), None, 1)
    return terms, TableGradient(none, torch.cat(gradients), torch.cat(scales))
