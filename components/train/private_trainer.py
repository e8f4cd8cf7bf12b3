"""What `make_private` gives: the steps of a private model of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lazydp.components.shared.errors import BudgetExceededError, FormatError, InputError
from lazydp.components.train.device.allocator import keep_freed_memory
from lazydp.components.train.device.placement import Placement, moved
from lazydp.components.train.engine.dense import DenseLayers, DenseOptimizer
from lazydp.components.train.engine.report import StepReport
from lazydp.components.train.mechanism.capture import Capture
from lazydp.components.train.mechanism.contributions import Contributions, units_of
from lazydp.components.train.mechanism.coupling import CouplingCheck, Disturbance
from lazydp.components.train.mechanism.example_dims import of_results
from lazydp.components.train.mechanism.gradient_check import GradientCheck, Reading, ReadRows
from lazydp.components.train.mechanism.layers import Layers, slow_paths
from lazydp.components.train.mechanism.moved_buffers import MovedBuffers
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.mechanism.per_example import running_apart
from lazydp.components.train.mechanism.step_guard import StepGuard
from lazydp.components.train.mechanism.units import Units
from lazydp.components.train.tables.embedding_tables import EmbeddingTables, Mode, TableGradient
from lazydp.components.train.tables.examples_apart import are_apart, with_whole_batch
from lazydp.components.train.tables.lazy_embedding import LazyRows
from lazydp.components.train.tables.lookups import Lookups, join, join_lookups
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.arguments import Distribution
from lazydp.kernels.noise_key import NoiseKey

Losses = Callable[[], Tensor]
"""Runs the model and gives the loss of each example, [B]; no reduction."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one micro-batch leaves for the end of the step."""

    losses: Tensor
    tables: dict[str, TableGradient]
    contributions: Contributions


class PrivateTrainer:
    """Trains what `make_private` prepared; see there."""

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers,
        placement: Placement,
        rows: Mapping[str, LazyRows],
        key: NoiseKey,
        privacy: PrivacyParameters,
        embeddings: EmbeddingSgd,
        dense: DenseOptimizer,
        mode: Mode,
        steps: int | None,
        noise: Distribution,
        allow_moving_buffers: bool,
        allow_unrepeatable_losses: bool,
    ) -> None:
        keep_freed_memory()
        self.model = model
        self.privacy = privacy
        self.mode: Mode = mode
        self.steps = steps
        self.embeddings = embeddings
        self.allow_moving_buffers = allow_moving_buffers
        self.allow_unrepeatable_losses = allow_unrepeatable_losses
        self._key = key
        self._nonce = key.new_nonce()
        self._own = own = key.for_trainer(self._nonce)
        tables = {name: layer.weight for name, layer in rows.items()}
        padding = {name: layer.padding_idx for name, layer in rows.items()}
        self.tables = EmbeddingTables(
            tables,
            mode=mode,
            optimizer=embeddings,
            noise_scale=privacy.noise_scale("embeddings"),
            key=own,
            noise=noise,
            bound=privacy.bound("embeddings"),
            constant_rows={name: row for name, row in padding.items() if row is not None},
        )
        self.dense = DenseLayers(model, optimizer=dense, noise_scale=privacy.noise_scale("dense"), key=own, noise=noise)
        self._layers = layers
        self._placement = placement
        self._rows = tuple(rows.values())
        self._readings: list[Reading] = []
        self._coupling = CouplingCheck(allow_unrepeatable=allow_unrepeatable_losses)
        self._gradients = GradientCheck(layers, tables)
        self._buffers = None if allow_moving_buffers else MovedBuffers(model, without=self._rows)
        self._guard = StepGuard()

    @property
    def steps_done(self) -> int:
        """Steps completed."""
        return self.tables.step

    @property
    def slow_paths(self) -> tuple[str, ...]:
        """Names of the parameters whose per-example gradients are formed, at B times their memory."""
        return slow_paths(self._layers)

    @property
    def noise_key(self) -> NoiseKey:
        """The key that the noise is drawn under: private, for the proof that an export makes."""
        return self._own

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the dense layers: attach a scheduler of `torch.optim.lr_scheduler` to it, and step that
        after each step of the trainer. (The tables' schedule is known in advance: see `schedules.from_torch`.)

        Any schedule that does not look at losses or metrics: they are private, and a rate that follows them
        (`ReduceLROnPlateau`) shows them in the model without noise, outside of every epsilon.
        """
        return self.dense.optimizer

    def step(self, *micro_batches: Losses, user_sizes: Sequence[Tensor] | None = None) -> StepReport:
        """Do one step; no micro-batch at all is an empty Poisson draw: noise alone, and it counts.

        Args:
            micro_batches: each gives the losses [B] of its examples; all sum to one step. In each of the first three
                steps one is called five times, to find examples that depend on each other (`coupling`) and weights that
                are used past their layers (`gradient_check`).
            user_sizes: with `PrivacyParameters.user_gradient`, for each micro-batch how many of its examples each user
                has, int64 [U]: a user's examples lie side by side, and all in one micro-batch.

        Raises:
            InputError: losses are not one an example, or an example's loss depends on another example, or users' sizes
                that the micro-batches don't have. Nothing has changed then: another call takes the same step.
            UnfinishedStepError: a step before it was interrupted while it changed the weights.
            BudgetExceededError: all steps that the noise was calibrated for are done.
        """
        self._guard.refuse_unfinished()
        self.refuse_step_beyond_the_last()
        # However the sample is cut into k micro-batches, by their size or by their number: one more example moves at
        # most k others into each.
        self.dense.begin_step(self.tables.step + 1, exchanges=len(micro_batches) ** 2)
        if self._buffers is not None:
            self._buffers.begin()
        sizes = [None] * len(micro_batches) if user_sizes is None else user_sizes
        if len(sizes) != len(micro_batches):
            raise InputError(f"{len(micro_batches)} micro-batches came with the user_sizes of {len(sizes)}")
        passes = [self._pass(losses_of, of_users) for losses_of, of_users in zip(micro_batches, sizes, strict=True)]
        step = self.tables.step + 1
        self.tables.refuse_step(sum(done.losses.shape[0] for done in passes))
        self.dense.set_rate(step)
        sent = {name: [done.tables[name] for done in passes if name in done.tables] for name in self.tables.names}
        groups = self.tables.group_rows([{name: part.lookups for name, part in done.tables.items()} for done in passes])
        self._begin_change()
        self.tables.add_gradient(groups, {name: parts for name, parts in sent.items() if parts})
        self.dense.add_noise(step)
        self.dense.update()
        self.tables.advance()
        self._end_change()
        return StepReport.of(step, [done.losses for done in passes], [done.contributions for done in passes])

    def flush(self) -> None:
        """Apply all pending noise: before evaluating, saving or releasing the model. Training may go on.

        Raises:
            UnfinishedStepError: a step was interrupted while it changed the weights.
        """
        self._guard.refuse_unfinished()
        self.tables.flush()
        self._mark_rows()

    def pending(self) -> int:
        """Number of rows with pending noise."""
        return self.tables.pending()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a private checkpoint needs beside the key: references, not copies, with pending noise.

        It goes on from there to the same bits if the key, the batches and the schedules are the same. From one state
        let one continuation out: two that draw the same noise under other batches give the noise away.

        Raises:
            UnfinishedStepError: a step was interrupted while it changed the weights.
        """
        self._guard.refuse_unfinished()
        with self._rows_kept():
            dense = self.dense.state_dict()
        return {
            "mode": self.mode,
            "steps": self.steps,
            "privacy": asdict(self.privacy),
            "nonce": self._nonce.hex(),
            "dense": dense,
            "embeddings": self.tables.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, copied into this trainer and its model; also after an interrupted step.

        Raises:
            FormatError: the state belongs to another mode, mechanism, number of steps, model or optimizer; the message
                names it.
        """
        for what, ours in (("mode", self.mode), ("steps", self.steps), ("privacy", asdict(self.privacy))):
            if state[what] != ours:
                raise FormatError(f"the state's {what} is {state[what]!r}, this trainer's {ours!r}")
        nonce = _nonce_of(state)
        own = self._key.for_trainer(nonce)
        self._begin_change()
        self._nonce, self._own = nonce, own
        self.tables.draw_under(own)
        self.dense.draw_under(own)
        self.tables.load_state_dict(state["embeddings"])
        with self._rows_kept():
            self.dense.load_state_dict(state["dense"])
        self._end_change()

    def refuse_step_beyond_the_last(self) -> None:
        """Refuse a step after the last one.

        Raises:
            BudgetExceededError: all steps that the noise was calibrated for are done.
        """
        if self.steps is not None and self.steps_done >= self.steps:
            raise BudgetExceededError(
                f"all {self.steps} steps that the noise was calibrated for are done, and step {self.steps_done + 1} "
                "would spend more than was stated: flush() and use the model, or calibrate the noise for more steps "
                "and train anew"
            )

    def _begin_change(self) -> None:
        # Should the change not end, the rows stay inside too: they then hold a gradient without its noise.
        for layer in self._rows:
            layer.has_pending_noise = True
        self._guard.begin()

    def _end_change(self) -> None:
        self._mark_rows()
        self._guard.end()

    def _mark_rows(self) -> None:
        for layer in self._rows:
            layer.has_pending_noise = self.tables.has_pending_noise

    @contextmanager
    def _rows_kept(self) -> Iterator[None]:
        for layer in self._rows:
            layer.kept_by_trainer = True
        try:
            yield
        finally:
            for layer in self._rows:
                layer.kept_by_trainer = False

    def _pass(self, losses_of: Losses, user_sizes: Tensor | None) -> _Pass:
        self._readings.clear()
        step = self.tables.step + 1
        self._coupling.begin(step)
        try:
            capturing = Capture(self._layers, self._placement.device, self.dense.sums, self.dense.order)
            with self._reading(self._read), capturing as capture:
                losses = losses_of()
                if losses.dim() != 1:
                    raise InputError(f"expected one loss an example, [B], found {list(losses.shape)}: no reduction")
                units = units_of(losses.shape[0], user_sizes, self.privacy)
                self._refuse_other_sizes(losses.shape[0])
                looks = self._coupling.looks_at(losses, units)
                looks = looks and (units.count > 1 or self._gradients.looks_at(losses, step=step))
                if looks:
                    pooled = [(reading.table, reading.pooled) for reading in self._readings]
                    self._coupling.refuse_gradients(capture, losses, pooled, units)
                losses.sum().backward()  # type: ignore[no-untyped-call]
            of_dense = capture.sq_norms(units)
            if looks:
                self._look(losses_of, losses.detach(), units, capture, step=step)
        finally:
            if self._buffers is not None:
                self._buffers.refuse()
        tables = self._joined()
        losses, of_dense = moved([losses.detach(), of_dense], self._placement.table_device)
        contributions = Contributions.of(of_dense, tables, units, self.privacy)
        return _Pass(losses, contributions.add(capture, tables), contributions)

    def _look(self, losses_of: Losses, losses: Tensor, units: Units, capture: Capture, *, step: int) -> None:
        """Compute the losses again, and refuse what should not change them or their gradients."""
        readings = tuple(self._readings)
        run = partial(self._losses_again, losses_of, as_written=not self._coupling.drew())
        repeats = self._coupling.refuse_values(run, losses, units, step=step)
        if not (repeats and self._gradients.looks_at(losses, step=step)):
            return
        again = partial(self._losses_from, losses_of)
        # Rows are not a number meanwhile: interrupted in between, the trainer stops until a state is loaded.
        self._begin_change()
        try:
            self._gradients.refuse(capture, readings, losses, again, units=units, step=step)
        except Exception:
            self._end_change()
            raise
        self._end_change()

    @contextmanager
    def _reading(self, read: ReadRows) -> Iterator[None]:
        """Calls of embedding layers are answered by `read`."""
        for layer in self._rows:
            layer.read = read
        try:
            yield
        finally:
            for layer in self._rows:
                layer.read = None

    def _losses_from(self, losses_of: Losses, read: ReadRows) -> Tensor:
        with self._reading(read), self._coupling.replayed(), running_apart(self._layers):
            return losses_of()

    def _losses_again(self, losses_of: Losses, disturbance: Disturbance, *, as_written: bool) -> Tensor:
        """The losses once more, with what tables and layers give disturbed; for a look at them and nothing else.

        Args:
            losses_of: gives them.
            disturbance: of what tables and layers give.
            as_written: let the model run as it is written, on the slow path, too, where nothing is disturbed: it has to
                give the same. (Dropout does not: it draws in the order of a tensor's memory.)
        """
        if disturbance.is_none and as_written:
            with self._reading(self._pooled):
                return losses_of()

        def read(table: str, lookups: Lookups) -> Tensor:
            return disturbance.of_rows(self._pooled(table, lookups))

        def disturb(layer: nn.Module, inputs: object, output: Any) -> Any:
            leaves, structure = tree_flatten(output)
            if are_apart():
                whole = partial(with_whole_batch, disturbance.of_outputs)
                return tree_unflatten([whole(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
            for place, dim in of_results(layer, leaves).items():
                if leaves[place].dim() > dim:
                    leaves[place] = disturbance.of_outputs(leaves[place].movedim(dim, 0)).movedim(0, dim)
            return tree_unflatten(leaves, structure)

        handles = [layer.module.register_forward_hook(disturb) for layer in self._layers.values()]
        try:
            with self._reading(read), running_apart(self._layers):
                return losses_of()
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, table: str, lookups: Lookups) -> Tensor:
        pooled = self._pooled(table, lookups).requires_grad_()
        self._readings.append(Reading(table, lookups, pooled))
        return pooled

    def _pooled(self, table: str, lookups: Lookups) -> Tensor:
        self.tables.catch_up(self.tables.group_rows([{table: lookups}]))
        return self.tables.gather({table: lookups})[table]

    def _refuse_other_sizes(self, size: int) -> None:
        for reading in self._readings:
            if reading.lookups.num_bags != reading.lookups.bags_per_example * size:
                raise InputError(
                    f"embedding layer {reading.table!r} read {reading.lookups.num_bags} bags in a batch of {size} "
                    "examples: layers must be batch-first, and what is the same for all examples is read for each "
                    "(positions.expand(B, L))"
                )

    def _joined(self) -> dict[str, tuple[Lookups, Tensor]]:
        """All reads of each table as one, with their gradients: equal rows must meet before the norm is taken."""
        by_table: dict[str, list[Reading]] = {}
        for reading in self._readings:
            by_table.setdefault(reading.table, []).append(reading)
        self._readings.clear()
        return {name: _join_readings(readings) for name, readings in by_table.items()}


def _join_readings(readings: Sequence[Reading]) -> tuple[Lookups, Tensor]:
    width = sum(reading.lookups.bags_per_example for reading in readings)
    lookups = join_lookups([reading.lookups for reading in readings], bags_per_example=width)
    gradients = [r.pooled.grad if r.pooled.grad is not None else torch.zeros_like(r.pooled) for r in readings]
    return lookups, join(gradients)


def _nonce_of(state: Mapping[str, Any]) -> bytes:
    try:
        return bytes.fromhex(state["nonce"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"the state lacks the nonce of its trainer's noise: {error}; it was not written whole"
        ) from error
