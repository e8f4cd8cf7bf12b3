"""Embedding tables in training: a row's noise is pending until the row is read, or flushed.

Per step t: `group_rows` (of the batch), `catch_up` (those rows, to t - 1), `gather` (or both in one pass over the rows:
`catch_up_and_gather`), `add_gradient`, `advance` (the noise of step t becomes pending, or in mode `dpsgd` is added to
every row). See `skip_ahead` for the mathematics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lazydp.components.shared.errors import FormatError, InputError, NonFiniteError, PendingNoiseError
from lazydp.components.shared.noise_addresses import MAX_TABLES
from lazydp.components.train.device.placement import CPU
from lazydp.components.train.ranks.ranks import Alone, Ranks, most
from lazydp.components.train.tables.lookups import Lookups, join, join_lookups
from lazydp.components.train.tables.precision import MOST_MARGIN, Rounding, RowSizes, expected_largest
from lazydp.components.train.tables.rounding_watch import RoundingWatch
from lazydp.components.train.tables.second_float import chunks
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd, SkipAhead
from lazydp.components.train.tables.table import Table
from lazydp.kernels import ops
from lazydp.kernels.arguments import Distribution, RowGroups
from lazydp.kernels.noise_key import NoiseKey

Mode = Literal["lazydp", "dpsgd", "sgd"]
"""`lazydp`: a row gets its noise when it is read. `dpsgd`: the same step, but every row gets its noise at every step.
`sgd`: neither clipping nor noise."""

_FINITE_CHUNK = 1 << 22
_log = logging.getLogger("lazydp.train")
# An exact sum has 63 bits, of which one unit takes 38 (`ops.scatter_add_`).
_MAX_EXAMPLES = 1 << 24


@dataclass(frozen=True, slots=True)
class TableGradient:
    """What one micro-batch sends back to one table.

    Attributes:
        lookups: where it came from.
        gradient: of each bag, float32 [F * B, D].
        scale: of each example, float32 [B]: the clipping coefficient, divided by the expected batch size.
    """

    lookups: Lookups
    gradient: Tensor
    scale: Tensor

    def scale_of_bags(self) -> Tensor:
        """The scale of each bag's example, float32 [F * B]."""
        width = self.lookups.bags_per_example
        return self.scale if width == 1 else self.scale.repeat(width)


@dataclass(frozen=True, slots=True)
class GroupedLookups:
    """The lookups of one table by all micro-batches of a step, one after the other.

    Attributes:
        rows: the N lookups by row.
        bag_of_lookup: int64 [N]; bags count through all micro-batches.
        weights: of each lookup, float32 [N], or None where all are 1.
    """

    rows: RowGroups
    bag_of_lookup: Tensor
    weights: Tensor | None


class EmbeddingTables:
    """Every table of a model, and the noise that is pending for each row.

    Args:
        weights: initial weights, float32 [rows, dim] by table; trained in place, never copied. They are on one device,
            and so is everything that the tables are given or give, but the key.
        mode: when noise is added.
        optimizer: the linear step of the rows.
        noise_scale: sigma C / b; 0 in mode `sgd`.
        key: of the noise; None only where `noise_scale` is 0.
        noise: `gaussian`, or `ones` for tests of exactness.
        bound: what one privacy unit adds to all tables at most, in norm, divided by the expected batch size: C / b. Its
            gradients are then added exactly (`ops.scatter_add_`); None: in float32.
        constant_rows: for some tables one row that no example reads, and that gets no noise: padding.
        ranks: that hold the tables together; each has some rows of every table.
        first_rows: number in the table of the first row that is here, by table; None: the tables are whole.

    Raises:
        InputError: too many tables, tables on several devices, or noise without a key.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        mode: Mode,
        optimizer: EmbeddingSgd,
        noise_scale: float,
        key: NoiseKey | None,
        noise: Distribution = "gaussian",
        bound: float | None = None,
        constant_rows: Mapping[str, int] | None = None,
        ranks: Ranks | None = None,
        first_rows: Mapping[str, int] | None = None,
    ) -> None:
        if len(weights) > MAX_TABLES:
            raise InputError(f"at most {MAX_TABLES} tables have addresses for their noise, found {len(weights)}")
        if noise_scale and key is None:
            raise InputError("tables with noise need a noise key")
        devices = {weight.device for weight in weights.values()} or {CPU}
        if len(devices) > 1:
            raise InputError(f"tables live on one device, found them on {', '.join(sorted(map(str, devices)))}")
        self._mode = mode
        self._noise = noise
        self._bound = bound
        self._key = key if key is not None else NoiseKey.for_tests(0)  # draws are multiplied by zero
        device = devices.pop()
        self._skip_ahead = SkipAhead(optimizer, noise_scale=noise_scale, distribution=noise, device=device)
        self._tables: dict[str, Table] = {}
        # One allocation, for huge pages: a step looks up one entry a row, each on a page of its own.
        rows = [weight.shape[0] for weight in weights.values()]
        last_of_tables = torch.split(torch.zeros(sum(rows), dtype=torch.int32, device=device), rows)
        for number, ((name, weight), last) in enumerate(zip(weights.items(), last_of_tables, strict=True)):
            momentum = torch.zeros_like(weight) if self._skip_ahead.dimension == 2 else None
            self._tables[name] = Table(
                number,
                weight,
                last,
                momentum,
                constant=(constant_rows or {}).get(name),
                first_row=(first_rows or {}).get(name, 0),
            )
        self._has_pending_noise = False
        self._optimizer = optimizer
        # None where nothing is clipped or has noise: rounding then shows nothing that is to be hidden.
        self._rounding = Rounding(optimizer, bound, noise_scale) if bound is not None and noise_scale > 0.0 else None
        self._watch: RoundingWatch | None = None
        if self._rounding is not None:
            ranks = ranks or Alone()
            self._watch = RoundingWatch(self._rounding, keeps_bounds=mode == "lazydp", ranks=ranks)
            here = torch.tensor([expected_largest(of.weight) for of in self._tables.values()], dtype=torch.float64)
            expected = most(ranks, here, purpose="begin").tolist()
            for (name, table), largest in zip(self._tables.items(), expected, strict=True):
                table.expected = largest
                table.began_with_two = self._rounding.begins_with_two(table.weight, largest)
                if table.began_with_two:
                    table.two_floats()
                    _log.info("table %r keeps two float32 a weight: at this learning rate one rounds noise away", name)

    @property
    def has_pending_noise(self) -> bool:
        """Whether a step was completed after the last flush: `pending() > 0`, without a look at every row."""
        return self._has_pending_noise

    @property
    def rounding(self) -> Rounding | None:
        """What the rounding of rows is measured by; None where nothing is clipped or has noise."""
        return self._rounding

    @property
    def step(self) -> int:
        """Steps completed."""
        return self._skip_ahead.step

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tables, in the order of their numbers."""
        return tuple(self._tables)

    @property
    def columns(self) -> dict[str, int]:
        """D of each table, in the order of their numbers."""
        return {name: table.weight.shape[1] for name, table in self._tables.items()}

    def draw_under(self, key: NoiseKey) -> None:
        """Draw noise under `key` from now on."""
        self._key = key

    def group_rows(self, reads: Sequence[Mapping[str, Lookups]]) -> dict[str, GroupedLookups]:
        """The distinct rows that the micro-batches `reads` read, found once for catching up and for the gradient."""
        return grouped(reads, {name: table.weight.shape[0] for name, table in self._tables.items()})

    def catch_up(self, groups: Mapping[str, GroupedLookups]) -> None:
        """Give the rows of `groups` the noise of every completed step they miss."""
        if self._skip_ahead.is_identity:
            return
        single = []
        for name, group in groups.items():
            if self._tables[name].has_two_floats:
                self._catch_up_two_floats(self._tables[name], group.rows.rows)
            else:
                single.append(name)
        tables = [self._tables[name] for name in single]
        ops.foreach_catch_up_(
            [table.weight for table in tables],
            [table.last for table in tables],
            [groups[name].rows.rows for name in single],
            self._key.tensor(),
            **self._catch_up_arguments(tables),
        )

    def gather(self, reads: Mapping[str, Lookups]) -> dict[str, Tensor]:
        """Pooled rows [F * B, D] of each table; the rows must have caught up."""
        return pooled([self._tables[name].weight for name in reads], [of.indices for of in reads.values()], reads)

    def catch_up_and_gather(
        self, groups: Mapping[str, GroupedLookups], reads: Mapping[str, Lookups]
    ) -> dict[str, Tensor]:
        """`catch_up`, then `gather`, in one pass over rows that stand alone in their bag.

        Args:
            groups: what `group_rows` gave for this one micro-batch.
            reads: the micro-batch.
        """
        if self._skip_ahead.is_identity or any(self._tables[name].has_two_floats for name in reads):
            self.catch_up(groups)
            return self.gather(reads)
        tables = [self._tables[name] for name in reads]
        sums = ops.foreach_catch_up_bag_sum_(
            [table.weight for table in tables],
            [table.last for table in tables],
            [groups[name].rows for name in reads],
            self._key.tensor(),
            [read.indices for read in reads.values()],
            [read.offsets for read in reads.values()],
            [groups[name].bag_of_lookup for name in reads],
            per_lookup_weights=[read.weights for read in reads.values()],
            **self._catch_up_arguments(tables),
        )
        return dict(zip(reads, sums, strict=True))

    def _catch_up_arguments(self, tables: Sequence[Table]) -> dict[str, Any]:
        """Arguments of the operators that bring rows of `tables` up to the present step."""
        return {
            "tables": [table.number for table in tables],
            "momenta": [table.momentum for table in tables if table.momentum is not None],
            "step": self.step,
            "transition": self._skip_ahead.transition,
            "factor": self._skip_ahead.factor,
            "noise": self._noise,
            "first_rows": [table.first_row for table in tables],
        }

    def refuse_step(self, examples: int) -> None:
        """Refuse the coming step where it cannot be done; to be called before anything is changed.

        Args:
            examples: how many it has, over all micro-batches.

        Raises:
            InputError: more examples than exact sums hold, or a schedule without a usable rate for the step.
        """
        if self._bound is not None and examples >= _MAX_EXAMPLES:
            raise InputError(
                f"a private step sums fewer than 2^24 examples, this one has {examples}: lower sampling_prob"
            )
        self._optimizer.rate(self.step + 1)

    def add_gradient(
        self, groups: Mapping[str, GroupedLookups], gradients: Mapping[str, Sequence[TableGradient]]
    ) -> None:
        """Apply the gradient of the coming step to the rows it touches.

        Args:
            groups: what `group_rows` gave for the same micro-batches.
            gradients: by table, one for each micro-batch, in the same order. Together they are of the examples that
                `refuse_step` was asked about.
        """
        names = [name for name in gradients if not self._is_below_precision(self._tables[name])]
        self._watch_rounding(groups, names)
        single = []
        for name in names:
            if self._tables[name].has_two_floats:
                self._add_to_two_floats(name, groups[name], gradients[name])
            else:
                single.append(name)
        tables = [self._tables[name] for name in single]
        ops.foreach_scatter_add_(
            [table.weight if table.momentum is None else table.momentum for table in tables],
            [groups[name].rows for name in single],
            [groups[name].bag_of_lookup for name in single],
            [join([part.gradient for part in gradients[name]]) for name in single],
            [join([part.scale_of_bags() for part in gradients[name]]) for name in single],
            alpha=self._skip_ahead.gradient_scale(),
            per_lookup_weights=[groups[name].weights for name in single],
            bound=self._bound,
        )

    def _add_to_two_floats(self, name: str, group: GroupedLookups, parts: Sequence[TableGradient]) -> None:
        self._tables[name].two_floats().scatter_add(
            group.rows,
            group.bag_of_lookup,
            join([part.gradient for part in parts]),
            join([part.scale_of_bags() for part in parts]),
            alpha=self._skip_ahead.gradient_scale(),
            per_lookup_weights=group.weights,
            bound=self._bound,
        )

    def _is_below_precision(self, table: Table) -> bool:
        """Whether the step moves so little that rounding would show more of it than its noise covers.

        Such are the last steps of a schedule that ends near 0. They add their noise, and no gradient. Public numbers
        decide, never the rows: with and without its gradient a step differs by more than one unit.
        """
        rate = self._optimizer.rate(self.step + 1)
        if self._rounding is None or table.began_with_two or not self._rounding.is_negligible(rate):
            return False
        return self._rounding.margin(RowSizes(table.expected), columns=table.weight.shape[1], rate=rate) > MOST_MARGIN

    def _watch_rounding(self, groups: Mapping[str, GroupedLookups], names: Sequence[str]) -> None:
        """Give tables whose rows outgrew one float32 the second, before the step's gradient is rounded to the first."""
        if self._rounding is None or self._watch is None:
            return
        outgrown = self._watch.outgrown(
            {name: self._tables[name] for name in names},
            {name: groups[name].rows for name in names},
            rate=self._optimizer.rate(self.step + 1),
            reach=abs(self._skip_ahead.gradient_scale()) * self._rounding.bound,
            noise=self._skip_ahead.longest_noise,
        )
        for name in outgrown:
            self._tables[name].two_floats()
            _log.info("[private] step %d: table %r keeps two float32 a weight from here on", self.step + 1, name)

    def _catch_up_two_floats(self, table: Table, rows: Tensor) -> None:
        table.two_floats().catch_up(
            table.last,
            rows,
            self._key.tensor(),
            number=table.number,
            arguments=self._catch_up_of_one(table),
            exact_transition=self._skip_ahead.exact_transition,
        )

    def _catch_up_of_one(self, table: Table) -> dict[str, Any]:
        """The same of the operators that take one table; without its number and velocity."""
        arguments = self._catch_up_arguments([table])
        return {name: arguments[name] for name in ("step", "transition", "factor", "noise")} | {
            "first_row": table.first_row
        }

    def advance(self) -> None:
        """Complete the step: its noise is pending from now on; in mode `dpsgd` it is added to every row at once."""
        self._skip_ahead.advance()
        for table in self._tables.values():
            if table.constant is not None:
                table.last[table.constant] = self.step
        self._has_pending_noise = not self._skip_ahead.is_identity
        if self._mode == "dpsgd":
            self.flush()

    def flush(self) -> None:
        """Bring every row of every table up to date; nothing is pending afterwards."""
        if self._watch is not None:
            self._watch.forget()  # who has flushed may change weights
        if self._skip_ahead.is_identity:
            return
        for table in self._tables.values():
            if table.has_two_floats:
                for rows in chunks(table.weight.shape[0], table.weight.device):
                    self._catch_up_two_floats(table, rows)
                continue
            ops.flush_(
                table.weight,
                table.last,
                self._key.tensor(),
                table=table.number,
                momentum=table.momentum,
                **self._catch_up_of_one(table),
            )
        self._has_pending_noise = False

    def pending(self) -> int:
        """Number of rows with pending noise."""
        if self._skip_ahead.is_identity:
            return 0
        return sum(int((table.last != self.step).sum()) for table in self._tables.values())

    def weights(self) -> dict[str, Tensor]:
        """The weights of every table, the very tensors, for release or evaluation.

        Raises:
            PendingNoiseError: a row has pending noise; flush first.
            NonFiniteError: a weight is not finite.
        """
        pending = self.pending()
        if pending:
            raise PendingNoiseError(
                f"{pending} rows still have pending noise at step {self.step}: flush before weights leave training"
            )
        for name, table in self._tables.items():
            if not _all_finite(table.weight):
                raise NonFiniteError(
                    f"table {name!r} holds weights that are not finite: the run diverged, lower the learning rate"
                )
        return {name: table.weight for name, table in self._tables.items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights with their pending noise, for a private checkpoint: references, not copies."""
        return {
            "tables": {name: table.state() for name, table in self._tables.items()},
            "skip_ahead": self._skip_ahead.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, copied into the tensors of this object.

        Raises:
            FormatError: tables of other names or shapes, or another optimizer.
        """
        if list(state["tables"]) != list(self._tables):
            raise FormatError(
                f"the checkpoint has tables {list(state['tables'])}, this run has {list(self._tables)}: "
                "it belongs to another model"
            )
        for name, table in self._tables.items():
            table.check(state["tables"][name], name)
        self._skip_ahead.load_state_dict(state["skip_ahead"])
        if self._watch is not None:
            self._watch.forget()
        precision = state.get("precision", {})
        for name, table in self._tables.items():
            table.load(state["tables"][name], older=precision)
        self._has_pending_noise = self.pending() > 0


def grouped(reads: Sequence[Mapping[str, Lookups]], num_rows: Mapping[str, int]) -> dict[str, GroupedLookups]:
    """The lookups of micro-batches by row, for each table that they read.

    Args:
        reads: of each micro-batch, by table.
        num_rows: of every table.
    """
    joined = {}
    for name in num_rows:
        parts = [read[name] for read in reads if name in read]
        if parts:
            joined[name] = join_lookups(parts, bags_per_example=parts[0].bags_per_example)
    rows = ops.foreach_group_rows(
        [lookups.indices for lookups in joined.values()], num_rows=[num_rows[name] for name in joined]
    )
    bags = ops.foreach_bag_ids(
        [lookups.offsets for lookups in joined.values()],
        num_lookups=[lookups.indices.shape[0] for lookups in joined.values()],
    )
    return {
        name: GroupedLookups(of_rows, of_bags, lookups.weights)
        for (name, lookups), of_rows, of_bags in zip(joined.items(), rows, bags, strict=True)
    }


def pooled(weights: Sequence[Tensor], indices: Sequence[Tensor], reads: Mapping[str, Lookups]) -> dict[str, Tensor]:
    """Pooled rows [F * B, D] of each table in `reads`.

    Args:
        weights: the rows [U, D] of each table in `reads`.
        indices: of each table in `reads`, the row of each lookup in `weights`, int64 [N].
        reads: bags and weights of the lookups.
    """
    sums = ops.foreach_bag_sum(
        weights, indices, [read.offsets for read in reads.values()], [read.weights for read in reads.values()]
    )
    return dict(zip(reads, sums, strict=True))


def _all_finite(weight: Tensor) -> bool:
    """Whether every entry is finite, in chunks: a mask of the table's size would double its memory."""
    flat = weight.view(-1)
    return all(bool(torch.isfinite(chunk).all()) for chunk in torch.split(flat, _FINITE_CHUNK))
