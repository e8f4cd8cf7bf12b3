"""One step of training, private or not. Read this file from top to bottom.

A unit is what is clipped as a whole: an example, or with user sampling a user with all examples. A step has these
phases, in this order. (`timer.py` names them. It names a phase `sampling` as well, which belongs to the caller.)

    lookups             find the rows that the batch reads
    catch-up            apply the pending noise of these rows; with a single micro-batch, pool them in this phase
    gather              pool the rows of a micro-batch, if that is not done yet
    forward             compute the losses
    backward            compute the gradients of all layers' outputs and of the pooled rows, in one pass
    norms               compute the norm of each unit's gradient, over all layers and tables
    weighted products   sum the clipped gradients of the dense layers, by one matrix product for each layer
    scatter             add the clipped gradients of the tables to the rows that were read
    dense noise         add noise to the summed gradients of the dense layers
    optimizer           update the dense layers; in mode `lazydp`, make the noise of this step pending on every row
    eager noise         in mode `dpsgd` instead: add the noise of this step to every row at once

The phases from gather to weighted products are repeated for each micro-batch. Mode `sgd` has no norms, no weighted
products and no noise.

Let g_i be the gradient of unit i, C the clipping norm, b the expected batch size and sigma the noise multiplier.
With c_i = min(1, C / ||g_i||), the optimizers apply

    g_hat = ( sum_i c_i g_i  +  sigma C xi ) / b,     xi ~ N(0, I) over every parameter and every row.

`mechanism/parameters.py` has the formula for one clipping norm per group of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lazydp.components.models.recommender import Recommender, initial_tables
from lazydp.components.shared.errors import FormatError, InputError
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.data.share import Share
from lazydp.components.train.device.allocator import keep_freed_memory
from lazydp.components.train.device.placement import HOST, Placement
from lazydp.components.train.engine.dense import DenseLayers, DenseOptimizer
from lazydp.components.train.engine.report import StepReport
from lazydp.components.train.engine.timer import Phase, StepTimer
from lazydp.components.train.engine.transfers import leaves, send_examples, send_gradients, send_lookups
from lazydp.components.train.mechanism.capture import Capture
from lazydp.components.train.mechanism.contributions import Contributions, objective, units_of
from lazydp.components.train.mechanism.layers import trained_layers
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.mechanism.step_guard import StepGuard
from lazydp.components.train.ranks.places import Arrangement, Places, shard
from lazydp.components.train.ranks.ranks import Alone, Ranks
from lazydp.components.train.tables.embedding_tables import EmbeddingTables, Mode, TableGradient
from lazydp.components.train.tables.lookups import Lookups, lookups_of, model_inputs
from lazydp.components.train.tables.row_exchange import RowExchange, Rows
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.arguments import Distribution
from lazydp.kernels.noise_key import NoiseKey


class Engine:
    """Trains a recommender step by step.

    Args:
        model: the dense layers; trained in place.
        mode: `lazydp`; `dpsgd`, the same step with eager noise; or `sgd`, a step without clipping and noise.
        privacy: parameters of the mechanism. Mode `sgd` uses only `expected_batch_size` and `user_gradient`.
        embeddings: optimizer of the tables.
        dense: optimizer of the dense layers.
        key: noise key; may be None in mode `sgd`, or if the noise multiplier is 0.
        tables: initial weights [R, D] by table, trained in place where they are on the tables' device already, else
            copied there. None: weights drawn from the model's public seed.
        noise: `gaussian`; or `ones`, for tests: every Gaussian number is 1, and the factor of pending noise is the sum
            of what each step contributes. Then pending and eager noise agree up to rounding.
        timer: adds up the time of each phase.
        placement: the device of the dense layers and the device of the tables. The engine moves them there. The caller
            gives examples on the host.
        ranks: that train together; None: this process alone. Several need the CPU, a mode that clips, and `tables`.
        arrangement: where the rows of the tables lie; `tables` are given, and kept, in the order of their places.
            With several ranks they are the rows of this rank (`ranks.places.shard`).

    Raises:
        InputError: a layer for which the norm of one example's gradient cannot be computed, a missing key, too many
            tables or dense parameters, or tables with other names, shapes or order than the model's.
    """

    def __init__(
        self,
        model: Recommender,
        *,
        mode: Mode,
        privacy: PrivacyParameters,
        embeddings: EmbeddingSgd,
        dense: DenseOptimizer,
        key: NoiseKey | None,
        tables: Mapping[str, Tensor] | None = None,
        noise: Distribution = "gaussian",
        timer: StepTimer | None = None,
        placement: Placement = HOST,
        ranks: Ranks | None = None,
        arrangement: Arrangement = "ordered",
    ) -> None:
        keep_freed_memory()
        self._ranks = ranks or Alone()
        if self._ranks.size > 1 and (mode == "sgd" or placement != HOST):
            raise InputError("several ranks train on the CPU, in a mode that clips")
        self._places = {name: Places.of_table(shape.num_rows, arrangement) for name, shape in model.tables.items()}
        self.model = model.to(placement.device)
        self.placement = placement
        self.mode: Mode = mode
        self.privacy = privacy
        self._private = mode != "sgd"
        self._layers = trained_layers(model) if self._private else {}
        noisy = self._private and privacy.noise_multiplier > 0.0
        if noisy and key is None:
            raise InputError(f"mode {mode!r} with noise needs a noise key: give key=NoiseKey.generate()")
        weights = _checked(model, self._ranks, tables if tables is not None else initial_tables(model))
        self.tables = EmbeddingTables(
            {name: weight.to(placement.table_device) for name, weight in weights.items()},
            mode=mode,
            optimizer=embeddings,
            noise_scale=privacy.noise_scale("embeddings") if noisy else 0.0,
            key=key,
            noise=noise,
            bound=privacy.bound("embeddings") if self._private else None,
            ranks=self._ranks,
            first_rows={name: own.start for name, own in _shards(model, self._ranks).items()},
        )
        num_rows = {name: places.num_rows for name, places in self._places.items()}
        alone = self._ranks.size == 1
        self._rows: Rows = self.tables if alone else RowExchange(self.tables, self._ranks, num_rows)
        self.dense = DenseLayers(
            model,
            optimizer=dense,
            noise_scale=privacy.noise_scale("dense") if noisy else 0.0,
            key=key,
            noise=noise,
            private=self._private,
        )
        self._timer = timer
        self._guard = StepGuard()

    @property
    def steps_done(self) -> int:
        """Number of completed steps."""
        return self.tables.step

    def step(self, batch: Examples | Sequence[Examples] | Share) -> StepReport:
        """Do one step with the examples of all micro-batches.

        The step is the same as with one large batch, up to rounding. A Poisson sample may be empty. Such a step adds
        noise only, and counts as a step.

        Args:
            batch: the examples; or this rank's share of them.

        Raises:
            UnfinishedStepError: an earlier step, or a load, was interrupted while it changed the weights.
            InputError: `user_sizes` of the examples do not fit `privacy.user_gradient`, a layer's input is not
                batch-first or was modified in place, matrix products are set to less than float32, or a private step
                has 2^24 examples or more.
        """
        self._guard.refuse_unfinished()
        share = batch if isinstance(batch, Share) else Share.whole(batch)
        micro_batches: Sequence[Examples] = list(share)
        step = self.tables.step + 1
        self.tables.refuse_step(share.examples)
        self.dense.set_rate(step)
        with self._phase("lookups"):
            reads = send_lookups(
                [self._placed(lookups_of(self.model.layout, examples)) for examples in micro_batches],
                self.placement.table_device,
            )
            micro_batches = send_examples(micro_batches, self.placement.device)
            groups = self._rows.group_rows(reads)
        # The rows of a single micro-batch catch up and are pooled by one call. Several micro-batches are pooled one by
        # one, since their pooled rows together might not fit into memory.
        pooled: Mapping[str, Tensor] | None = None
        with self._phase("catch-up"):
            if len(reads) == 1:
                pooled = self._rows.catch_up_and_gather(groups, reads[0])
            else:
                self._rows.catch_up(groups)
        # If the batch had one more example, every later one would move by one place, and each micro-batch would pass
        # its last example on to the next. So in each micro-batch one place may hold a different unit than without the
        # added example. `exchanges` counts these places (`UnitOrder.begin`). Units of other lanes stay where they are.
        self.dense.begin_step(self.tables.step + 1, exchanges=share.most_parts)
        passes: list[_Pass] = []
        for number, lane in enumerate(share.lanes):
            self.dense.begin_lane(share.first_lane + number, first=number == 0)
            of_lane = slice(len(passes), len(passes) + len(lane))
            passes += [
                self._pass(examples, read, pooled)
                for examples, read in zip(micro_batches[of_lane], reads[of_lane], strict=True)
            ]
            self.dense.end_lane()
        self._guard.begin()
        with self._phase("scatter"):
            gradients = {name: [done.tables[name] for done in passes] for name in groups}
            self._rows.add_gradient(groups, gradients)
        with self._phase("dense noise"):
            self.dense.sum_over(self._ranks)
            self.dense.add_noise(step)
        with self._phase("optimizer"):
            self.dense.update()
        with self._phase("eager noise" if self.mode == "dpsgd" else "optimizer"):
            self.tables.advance()
        self._guard.end()
        return self._report(step, passes)

    def _pass(self, examples: Examples, reads: Mapping[str, Lookups], gathered: Mapping[str, Tensor] | None) -> _Pass:
        """Do the forward and backward pass of one micro-batch, and add its clipped gradients to the dense gradients.

        Args:
            examples: of the micro-batch.
            reads: its lookups, by table.
            gathered: its pooled rows, by table, if they are there already.
        """
        units = units_of(examples.size, examples.user_sizes, self.privacy)
        with self._phase("gather"):
            pooled = leaves(self._rows.gather(reads) if gathered is None else gathered, self.placement.device)
        with Capture(self._layers, self.placement.device, self.dense.sums, self.dense.order) as capture:
            with self._phase("forward"):
                inputs = model_inputs(self.model.layout, examples, pooled, with_items=self.model.has_prior)
                losses = self.model.losses(self.model(inputs), examples.labels)
                # A private step sums the losses here. The factors that later multiply each example's gradient
                # (`Contributions.per_example`) include the division by b and, with user gradient `mean`, by the
                # number of the user's examples.
                total = losses.sum() if self._private else objective(losses, units, self.privacy)
            with self._phase("backward"):
                total.backward()  # type: ignore[no-untyped-call]
        if not self._private:
            gradients, (losses,) = send_gradients(pooled, [losses.detach()], self.placement.table_device)
            ones = torch.ones(examples.size, device=self.placement.table_device)
            sent = {name: TableGradient(reads[name], gradient, ones) for name, gradient in gradients.items()}
            return _Pass(losses, sent, units.count, None)
        with self._phase("norms"):
            others = [losses.detach(), capture.sq_norms(units)]
            gradients, (losses, of_dense) = send_gradients(pooled, others, self.placement.table_device)
            tables = {name: (reads[name], gradient) for name, gradient in gradients.items()}
            contributions = Contributions.of(of_dense, tables, units, self.privacy)
        with self._phase("weighted products"):
            return _Pass(losses, contributions.add(capture, tables), units.count, contributions)

    def flush(self) -> None:
        """Apply all pending noise. Weights may be released or evaluated after a flush only. Training may continue.

        Raises:
            UnfinishedStepError: a step, or a load, was interrupted while it changed the weights.
        """
        self._guard.refuse_unfinished()
        self.tables.flush()

    def pending(self) -> int:
        """Number of rows with pending noise."""
        return self.tables.pending()

    def table_weights(self) -> dict[str, Tensor]:
        """The weights [R, D] of every table by row, after a check that they may be released.

        They are not copied, unless rows lie elsewhere than by their number.

        Raises:
            InputError: the tables lie on several ranks.
            PendingNoiseError: a row has pending noise; call `flush` first.
            NonFiniteError: a weight or a dense parameter is not finite.
            UnfinishedStepError: a step, or a load, was interrupted while it changed the weights.
        """
        self._guard.refuse_unfinished()
        if self._ranks.size > 1:
            raise InputError(
                "the rows of the tables lie on several ranks: load a checkpoint of the run into one process"
            )
        self.dense.check_finite()
        return {name: self._places[name].by_row(weight) for name, weight in self.tables.weights().items()}

    def state_dict(self) -> dict[str, Any]:
        """The state for a private checkpoint, not copied. It contains neither the noise key nor the sampler.

        Raises:
            UnfinishedStepError: a step, or a load, was interrupted while it changed the weights.
        """
        self._guard.refuse_unfinished()
        return {"mode": self.mode, "dense": self.dense.state_dict(), "embeddings": self.tables.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state`, which `state_dict` gave, into this engine.

        Raises:
            FormatError: `state` belongs to another mode, model or optimizer; the message names the difference.
        """
        if state["mode"] != self.mode:
            raise FormatError(
                f"the checkpoint was written in mode {state['mode']!r}, and this run has mode {self.mode!r}: resume in "
                "the mode of the checkpoint, or train a new run"
            )
        self._guard.begin()
        self.tables.load_state_dict(state["embeddings"])
        self.dense.load_state_dict(state["dense"])
        self._guard.end()

    def _placed(self, reads: Mapping[str, Lookups]) -> Mapping[str, Lookups]:
        """The lookups with the places of rows in place of their numbers."""
        return {
            name: of if self._places[name].factor == 1 else replace(of, indices=self._places[name].of(of.indices))
            for name, of in reads.items()
        }

    def _report(self, step: int, passes: Sequence[_Pass]) -> StepReport:
        losses = [done.losses for done in passes]
        if not self._private:
            return StepReport.unclipped(step, losses, units=sum(done.units for done in passes))
        own = StepReport.of(step, losses, [done.contributions for done in passes if done.contributions is not None])
        return own.of_all(self._ranks)

    def _phase(self, name: Phase) -> AbstractContextManager[None]:
        return self._timer.phase(name) if self._timer is not None else nullcontext()


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the last phases of a step need from one micro-batch.

    Attributes:
        losses: [B].
        tables: the gradient of each table.
        units: number of units.
        contributions: the clipped contributions; None in mode `sgd`.
    """

    losses: Tensor
    tables: dict[str, TableGradient]
    units: int
    contributions: Contributions | None


def _shards(model: Recommender, ranks: Ranks) -> dict[str, range]:
    """The places of each table that are here."""
    return {name: shard(shape.num_rows, rank=ranks.rank, ranks=ranks.size) for name, shape in model.tables.items()}


def _checked(model: Recommender, ranks: Ranks, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    shards = _shards(model, ranks)
    expected = {name: (len(shards[name]), shape.dim) for name, shape in model.tables.items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if expected != found or list(expected) != list(found):
        raise InputError(
            f"initial weights must have the model's tables in the model's order, with shapes [rows, columns]: expected "
            f"{expected}, found {found}"
        )
    return weights
