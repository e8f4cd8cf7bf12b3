"""Embedding tables in training: a row's noise is pending until the row is read, or flushed.

Per step t: `group_rows` (of the batch), `catch_up` (those rows, to t - 1), `gather` (or both in one pass over the rows:
`catch_up_and_gather`), `add_gradient`, `advance` (the noise of step t becomes pending, or in mode `dpsgd` is added to
every row). See `skip_ahead` for the mathematics.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lazydp.components.shared.errors import FormatError, InputError, NonFiniteError, PendingNoiseError, PrivacyError
from lazydp.components.shared.noise_addresses import MAX_TABLES
from lazydp.components.train.device.placement import CPU
from lazydp.components.train.tables.lookups import Lookups, join, join_lookups
from lazydp.components.train.tables.precision import (
    MOST_MARGIN,
    expected_largest,
    largest_of,
    margin,
    needs_second_float,
)
from lazydp.components.train.tables.second_float import catch_up_rows, chunks
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd, SkipAhead
from lazydp.kernels import ops
from lazydp.kernels.arguments import Distribution, RowGroups
from lazydp.kernels.noise_key import NoiseKey

Mode = Literal["lazydp", "dpsgd", "sgd"]
"""`lazydp`: a row gets its noise when it is read. `dpsgd`: the same step, but every row gets its noise at every step.
`sgd`: neither clipping nor noise."""

_FINITE_CHUNK = 1 << 22
_MOST_GROWTH = 4.0
_log = logging.getLogger("lazydp.train")
# An exact sum has 63 bits, of which one unit takes 38 (`ops.scatter_add_`).
_MAX_EXAMPLES = 1 << 24


@dataclass(slots=True)
class _Table:
    number: int
    weight: Tensor
    last: Tensor
    momentum: Tensor | None
    rest: Tensor | None = None

    def second_float(self) -> Tensor:
        """What the weights leave of the true values."""
        if self.rest is None:
            self.rest = torch.zeros_like(self.weight)
        return self.rest


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
        self._tables: dict[str, _Table] = {}
        # One allocation, for huge pages: a step looks up one entry a row, each on a page of its own.
        rows = [weight.shape[0] for weight in weights.values()]
        last_of_tables = torch.split(torch.zeros(sum(rows), dtype=torch.int32, device=device), rows)
        for number, ((name, weight), last) in enumerate(zip(weights.items(), last_of_tables, strict=True)):
            momentum = torch.zeros_like(weight) if self._skip_ahead.dimension == 2 else None
            self._tables[name] = _Table(number, weight, last, momentum)
        self._has_pending_noise = False
        self._optimizer = optimizer
        # None where nothing is clipped or has noise: rounding then shows nothing that is to be hidden.
        rounds = bound if noise_scale > 0.0 else None
        self._largest = None if rounds is None else max(map(expected_largest, weights.values()), default=0.0)
        self._two_floats = rounds is not None and needs_second_float(
            weights.values(), optimizer=optimizer, bound=rounds
        )
        if self._two_floats:
            _log.info("tables keep two float32 a weight: at this learning rate and batch size one rounds noise away")

    @property
    def has_pending_noise(self) -> bool:
        """Whether a step was completed after the last flush: `pending() > 0`, without a look at every row."""
        return self._has_pending_noise

    @property
    def step(self) -> int:
        """Steps completed."""
        return self._skip_ahead.step

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tables, in the order of their numbers."""
        return tuple(self._tables)

    def draw_under(self, key: NoiseKey) -> None:
        """Draw noise under `key` from now on."""
        self._key = key

    def group_rows(self, reads: Sequence[Mapping[str, Lookups]]) -> dict[str, GroupedLookups]:
        """The distinct rows that the micro-batches `reads` read, found once for catching up and for the gradient."""
        joined = {}
        for name in self._tables:
            parts = [read[name] for read in reads if name in read]
            if parts:
                joined[name] = join_lookups(parts, bags_per_example=parts[0].bags_per_example)
        rows = ops.foreach_group_rows(
            [lookups.indices for lookups in joined.values()],
            num_rows=[self._tables[name].weight.shape[0] for name in joined],
        )
        bags = ops.foreach_bag_ids(
            [lookups.offsets for lookups in joined.values()],
            num_lookups=[lookups.indices.shape[0] for lookups in joined.values()],
        )
        return {
            name: GroupedLookups(of_rows, of_bags, lookups.weights)
            for (name, lookups), of_rows, of_bags in zip(joined.items(), rows, bags, strict=True)
        }

    def catch_up(self, groups: Mapping[str, GroupedLookups]) -> None:
        """Give the rows of `groups` the noise of every completed step they miss."""
        if self._skip_ahead.is_identity:
            return
        tables = [self._tables[name] for name in groups]
        if self._two_floats:
            for table, group in zip(tables, groups.values(), strict=True):
                self._catch_up_two_floats(table, group.rows.rows)
            return
        ops.foreach_catch_up_(
            [table.weight for table in tables],
            [table.last for table in tables],
            [group.rows.rows for group in groups.values()],
            self._key.tensor(),
            **self._catch_up_arguments(tables),
        )

    def gather(self, reads: Mapping[str, Lookups]) -> dict[str, Tensor]:
        """Pooled rows [F * B, D] of each table; the rows must have caught up."""
        pooled = ops.foreach_bag_sum(
            [self._tables[name].weight for name in reads],
            [read.indices for read in reads.values()],
            [read.offsets for read in reads.values()],
            [read.weights for read in reads.values()],
        )
        return dict(zip(reads, pooled, strict=True))

    def catch_up_and_gather(
        self, groups: Mapping[str, GroupedLookups], reads: Mapping[str, Lookups]
    ) -> dict[str, Tensor]:
        """`catch_up`, then `gather`, in one pass over rows that stand alone in their bag.

        Args:
            groups: what `group_rows` gave for this one micro-batch.
            reads: the micro-batch.
        """
        if self._skip_ahead.is_identity or self._two_floats:
            self.catch_up(groups)
            return self.gather(reads)
        tables = [self._tables[name] for name in reads]
        pooled = ops.foreach_catch_up_bag_sum_(
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
        return dict(zip(reads, pooled, strict=True))

    def _catch_up_arguments(self, tables: Sequence[_Table]) -> dict[str, Any]:
        """Arguments of the operators that bring rows of `tables` up to the present step."""
        return {
            "tables": [table.number for table in tables],
            "momenta": [table.momentum for table in tables if table.momentum is not None],
            "step": self.step,
            "transition": self._skip_ahead.transition,
            "factor": self._skip_ahead.factor,
            "noise": self._noise,
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
        tables = [self._tables[name] for name in gradients]
        if self._is_below_precision(tables):
            return
        ops.foreach_scatter_add_(
            [self._target(table) for table in tables],
            [groups[name].rows for name in gradients],
            [groups[name].bag_of_lookup for name in gradients],
            [join([part.gradient for part in parts]) for parts in gradients.values()],
            [join([part.scale_of_bags() for part in parts]) for parts in gradients.values()],
            alpha=self._skip_ahead.gradient_scale(),
            per_lookup_weights=[groups[name].weights for name in gradients],
            bound=self._bound,
        )

    def _target(self, table: _Table) -> Tensor:
        if table.momentum is not None:
            return table.momentum
        return table.second_float() if self._two_floats else table.weight

    def _is_below_precision(self, tables: Sequence[_Table]) -> bool:
        """Whether the step moves so little that rounding would show more of it than its noise covers.

        Such are the last steps of a schedule that ends near 0. They add their noise, and no gradient.
        """
        if self._largest is None or self._two_floats or self._optimizer.momentum:
            return False
        return self._margin(tables, self._largest, self._optimizer.rate(self.step + 1)) > MOST_MARGIN

    def _margin(self, tables: Iterable[_Table], largest: float, rate: float) -> float:
        assert self._bound is not None
        columns = max((table.weight.shape[1] for table in tables), default=0)
        return margin(largest=largest, columns=columns, rate=rate, bound=self._bound, optimizer=self._optimizer)

    def _catch_up_two_floats(self, table: _Table, rows: Tensor) -> None:
        arguments = self._catch_up_arguments([table])
        catch_up_rows(
            table.weight,
            table.second_float(),
            table.last,
            table.momentum,
            rows,
            self._key.tensor(),
            number=table.number,
            arguments={name: arguments[name] for name in ("step", "transition", "factor", "noise")},
            exact_transition=self._skip_ahead.exact_transition,
        )

    def advance(self) -> None:
        """Complete the step: its noise is pending from now on; in mode `dpsgd` it is added to every row at once."""
        self._skip_ahead.advance()
        self._has_pending_noise = not self._skip_ahead.is_identity
        if self._mode == "dpsgd":
            self.flush()

    def flush(self) -> None:
        """Bring every row of every table up to date; nothing is pending afterwards."""
        if self._skip_ahead.is_identity:
            return
        for table in self._tables.values():
            if self._two_floats:
                for rows in chunks(table.weight.shape[0], table.weight.device):
                    self._catch_up_two_floats(table, rows)
                continue
            ops.flush_(
                table.weight,
                table.last,
                self._key.tensor(),
                table=table.number,
                step=self.step,
                transition=self._skip_ahead.transition,
                factor=self._skip_ahead.factor,
                momentum=table.momentum,
                noise=self._noise,
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
        PrivacyError: weights grew so large that float32 rounded them before their noise.
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
        self._refuse_lost_noise()
        return {name: table.weight for name, table in self._tables.items()}

    def _refuse_lost_noise(self) -> None:
        """Weights that grew far beyond what the choice of one float32 was made for."""
        if self._largest is None or self._two_floats or not self.step:
            return
        largest = max((largest_of(table.weight) for table in self._tables.values()), default=0.0)
        if largest <= _MOST_GROWTH * self._largest:
            return
        rate = max(self._optimizer.rate(step) for step in range(1, self.step + 1))
        found = self._margin(self._tables.values(), largest, rate)
        if found > MOST_MARGIN:
            raise PrivacyError(
                f"a table's weights grew to {largest:.3g}, where float32 rounds a step of rate {rate:.3g} to "
                f"{found:.2g} of what one unit adds to a row (at most {MOST_MARGIN:.2g} is covered); nothing is "
                "released: train with a higher learning rate, a smaller expected_batch_size or larger initial weights"
            )

    def state_dict(self) -> dict[str, Any]:
        """Weights with their pending noise, for a private checkpoint: references, not copies."""
        tables = {
            name: {"weight": table.weight, "last": table.last, "momentum": table.momentum, "rest": table.rest}
            for name, table in self._tables.items()
        }
        return {
            "tables": tables,
            "skip_ahead": self._skip_ahead.state_dict(),
            "precision": {"two_floats": self._two_floats, "largest": self._largest},
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
            saved = state["tables"][name]
            if saved["weight"].shape != table.weight.shape or (saved["momentum"] is None) != (table.momentum is None):
                raise FormatError(
                    f"the checkpoint's table {name!r} has shape {tuple(saved['weight'].shape)}, this run's "
                    f"{tuple(table.weight.shape)}: it belongs to another model or optimizer"
                )
        self._skip_ahead.load_state_dict(state["skip_ahead"])
        for name, table in self._tables.items():
            saved = state["tables"][name]
            table.weight.copy_(saved["weight"])
            table.last.copy_(saved["last"])
            if table.momentum is not None:
                table.momentum.copy_(saved["momentum"])
            rest = saved.get("rest")
            table.rest = None if rest is None else table.second_float().copy_(rest)
        # Chosen from the initial weights, which a resumed run does not see: the state says.
        if "precision" in state:
            self._two_floats = bool(state["precision"]["two_floats"])
            self._largest = state["precision"]["largest"]
        self._has_pending_noise = self.pending() > 0


def _all_finite(weight: Tensor) -> bool:
    """Whether every entry is finite, in chunks: a mask of the table's size would double its memory."""
    flat = weight.view(-1)
    return all(bool(torch.isfinite(chunk).all()) for chunk in torch.split(flat, _FINITE_CHUNK))
