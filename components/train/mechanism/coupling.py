"""Whether examples are independent of each other: clipping bounds what one contributes only where they are.

A loss that depends on another example (negatives of the batch, statistics over it) makes that example move the
gradients of all: what it adds to the clipped sum then has no bound. The first steps of a trainer are looked at twice.

**At gradients.** For a half S of the privacy units, the gradient of a sum of the losses in S, weighted at random so
that nothing cancels, must be zero in every layer outside S. The halves are such that of every ordered pair of units
one has the first and not the second: about log2(units) + 2 backward passes see every pair.

**At values.** What a loss takes from others without a gradient (`detach`, ranks, a count) shows in its value alone. So
the losses are computed again while the outputs of all trained layers are disturbed in one half of the units, then in
the other: those of the half left alone must stay. A run before disturbs nothing: losses that differ even then (from
negatives of a generator of one's own, or batches taken from an iterator) cannot be compared, and are refused unless the
caller gives this look up.

**What neither sees**: what is computed from the data alone, above any trained layer. Inputs normalised by statistics of
the batch, or losses weighted by them, couple examples all the same. Nor is anything seen that couples later steps only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, count, islice

import torch
from torch import Tensor

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism.capture import Capture
from lazydp.components.train.mechanism.units import Units

STEPS_LOOKED_AT = 3
"""One look may miss what depends on data: a hinge that is inactive for all examples of a batch, say."""

_log = logging.getLogger("lazydp.train")

RandomState = tuple[Tensor, list[Tensor]]


class Disturbance:
    """Adds noise to what layers give for some examples, and leaves the others' bits alone.

    Args:
        examples: which, bool [B].
        generator: of the noise.
    """

    def __init__(self, examples: Tensor, generator: torch.Generator) -> None:
        self._examples = examples
        self._generator = generator

    @property
    def is_none(self) -> bool:
        """Whether no example is disturbed."""
        return not bool(self._examples.any())

    def of_outputs(self, outputs: Tensor) -> Tensor:
        """Outputs of a layer, [B, ...]; others (of a catalogue, for a metric) belong to no example and stay."""
        if outputs.shape[0] != self._examples.shape[0] or not outputs.is_floating_point():
            return outputs
        noise = torch.randn(outputs.shape, generator=self._generator).to(outputs.device, outputs.dtype)
        disturbed = outputs + noise * (1.0 + outputs.detach().abs())
        where = self._examples.view(-1, *[1] * (outputs.dim() - 1)).to(outputs.device)
        return torch.where(where, disturbed, outputs)

    def of_rows(self, pooled: Tensor) -> Tensor:
        """Pooled rows, [F * B, D], feature by feature."""
        by_example = pooled.view(-1, self._examples.shape[0], pooled.shape[1]).transpose(0, 1)
        return self.of_outputs(by_example).transpose(0, 1).reshape(pooled.shape)


LossesAgain = Callable[[Disturbance], Tensor]
"""Computes the losses [B] once more, with what layers and tables give disturbed."""


class CouplingCheck:
    """Looks at the first steps of one trainer, at one micro-batch of each.

    Args:
        allow_unrepeatable: go on, with a warning, where losses cannot be computed again alike.
    """

    def __init__(self, *, allow_unrepeatable: bool = False) -> None:
        self._allow_unrepeatable = allow_unrepeatable
        self._left = STEPS_LOOKED_AT
        self._step: int | None = None
        self._state: RandomState | None = None
        self._warned = False

    def begin(self, step: int) -> None:
        """Called before each forward pass of step number `step`."""
        self._state = _random_state() if self._left and step != self._step else None

    def looks_at(self, losses: Tensor, units: Units) -> bool:
        """Whether this micro-batch with these losses [B] is looked at; then both of the following are called."""
        return self._state is not None and units.count > 0 and bool(torch.isfinite(losses).all())

    def refuse_gradients(
        self, capture: Capture, losses: Tensor, pooled: Sequence[tuple[str, Tensor]], units: Units
    ) -> None:
        """Look at gradients, before the backward pass.

        Args:
            capture: of the forward pass.
            losses: [B].
            pooled: name and pooled rows [F * B, D] of each read of an embedding layer, feature by feature.
            units: of the micro-batch. Examples of one unit may depend on each other: they are clipped as one.

        Raises:
            InputError: a loss has a gradient in an example of another unit; the message names the layer.
        """
        size = losses.shape[0]
        generator = torch.Generator().manual_seed(self._left)
        weighted = losses * (0.5 + torch.rand(losses.shape, generator=generator)).to(losses.device, losses.dtype)
        for half in halves(units.count, generator):
            inside = units.per_example(half)
            for name, reached in capture.reached(weighted[inside.to(losses.device)].sum(), pooled, size):
                if bool((reached & ~inside).any()):
                    raise InputError(
                        f"the loss of one example depends on other examples through layer {name!r}: "
                        "compute each example's loss from that example alone"
                    )

    def refuse_values(self, run: LossesAgain, losses: Tensor, units: Units, *, step: int) -> bool:
        """Look at values, after the backward pass.

        Args:
            run: computes the losses again.
            losses: [B], as they came first.
            units: of the micro-batch.
            step: number of the step.

        Returns:
            Whether the losses can be computed again; false only where that was allowed.

        Raises:
            InputError: losses change with what other units' examples are, or cannot be computed again alike.
        """
        if units.count > 1:  # one unit alone depends on no other; whether its losses repeat is told all the same
            self._left -= 1
            self._step = step
        generator = torch.Generator().manual_seed(self._left)
        half = torch.randperm(units.count, generator=generator) % 2 == 0
        nobody, some, others = (units.per_example(part) for part in (half & ~half, half, ~half))
        again = self._again(run, [nobody, some, others], generator)
        if again is None or not _stayed(again[0], losses, ~nobody):
            self._unrepeatable()
            return False
        if not (_stayed(again[1], losses, others) and _stayed(again[2], losses, some)):
            raise InputError(
                "the loss of one example changes with what layers give for other examples, in its value if not in its "
                "gradient (a detached mean of the batch, ranks): compute each example's loss from that example alone"
            )
        return True

    def drew(self) -> bool:
        """Whether torch's generators were used since the forward pass began: dropout, say."""
        assert self._state is not None
        (on_host, on_devices), (now, now_on_devices) = self._state, _random_state()
        pairs = zip([on_host, *on_devices], [now, *now_on_devices], strict=False)
        return not all(torch.equal(before, after) for before, after in pairs)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Torch's generators as they were before the forward pass, so that dropout drops the same."""
        assert self._state is not None
        with _replayed(self._state):
            yield

    def _again(self, run: LossesAgain, disturbed: Sequence[Tensor], generator: torch.Generator) -> list[Tensor] | None:
        """The losses with each set of examples disturbed; None where the function cannot be called again."""
        again = []
        for examples in disturbed:
            try:
                with self.replayed():
                    again.append(run(Disturbance(examples, generator)).detach())
            except Exception:  # whatever the user's function raises: an iterator at its end, a check of its values
                return None
        return again

    def _unrepeatable(self) -> None:
        what = (
            "the losses of one batch cannot be computed again alike, so that neither examples that depend on each "
            "other by a value, nor weights and tables that are used past their layers, can be told: give step() a "
            "function that repeats itself, with what is random drawn by torch's default generator or before the step, "
            "and layers on the slow path that give a batch what they give its examples one by one"
        )
        if not self._allow_unrepeatable:
            raise InputError(
                f"{what}. make_private(..., allow_unrepeatable_losses=True) trains all the same; that nothing of the "
                "kind happens is then your word alone"
            )
        if not self._warned:
            self._warned = True
            _log.warning("%s", what)


def halves(units: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Sets of units, bool [units]: of every ordered pair (i, j) of units one set has i and not j.

    Unit i is in set s if s is among the k of i's own combination of k out of 2 k (or 2 k + 1) sets: no combination
    contains another one of its size.
    """
    if units < 2:
        return
    number = next(number for number in count(2) if math.comb(number, number // 2) >= units)
    members = torch.zeros(number, units, dtype=torch.bool)
    codes = islice(combinations(range(number), number // 2), units)
    for unit, code in zip(torch.randperm(units, generator=generator).tolist(), codes, strict=True):
        members[list(code), unit] = True
    yield from (half for half in members if bool(half.any()) and not bool(half.all()))


def _stayed(again: Tensor, losses: Tensor, examples: Tensor) -> bool:
    """Whether these examples' losses are what they were."""
    if again.shape != losses.shape:
        return False
    close = torch.isclose(again, losses, rtol=1e-4, atol=1e-6)
    return bool(close.cpu()[examples].all())


def _random_state() -> RandomState:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), on_devices


@contextmanager
def _replayed(state: RandomState) -> Iterator[None]:
    """Torch's generators as they were in `state`, so that dropout drops the same; afterwards as they are now."""
    now = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def _set_random_state(state: RandomState) -> None:
    on_host, on_devices = state
    torch.set_rng_state(on_host)
    if on_devices:
        torch.cuda.set_rng_state_all(on_devices)
