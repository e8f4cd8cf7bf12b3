"""Learning rates known in advance: functions of the step alone, hence public and without state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim.lr_scheduler import LRScheduler

from lazydp.components.shared.errors import InputError
from lazydp.components.train.tables.skip_ahead import Schedule


def constant(learning_rate: float) -> Schedule:
    """The same rate at every step."""
    return lambda step: learning_rate


def warmup_cosine(learning_rate: float, *, steps: int, warmup_steps: int = 0, final_fraction: float = 0.0) -> Schedule:
    """Linear rise over `warmup_steps`, then half a cosine down to `final_fraction * learning_rate` at `steps`."""

    def rate(step: int) -> float:
        if step <= warmup_steps:
            return learning_rate * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return learning_rate * (final_fraction + (1.0 - final_fraction) * cosine)

    return rate


def linear(learning_rate: float, *, steps: int, warmup_steps: int = 0, final_fraction: float = 0.0) -> Schedule:
    """Linear rise over `warmup_steps`, then a straight line down to `final_fraction * learning_rate` at `steps`."""

    def rate(step: int) -> float:
        if step <= warmup_steps:
            return learning_rate * step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return learning_rate * (1.0 - (1.0 - final_fraction) * progress)

    return rate


def tabulated(rates: Sequence[float]) -> Schedule:
    """`rates[t - 1]` at step t.

    Raises:
        InputError: when called for a step beyond the table.
    """

    def rate(step: int) -> float:
        if not 1 <= step <= len(rates):
            raise InputError(f"the learning rate schedule covers steps 1 to {len(rates)}, step {step} was asked for")
        return rates[step - 1]

    return rate


def from_torch(make: Callable[[torch.optim.Optimizer], LRScheduler], *, learning_rate: float, steps: int) -> Schedule:
    """The rates that a scheduler of `torch.optim.lr_scheduler` gives over `steps` steps, tabulated.

    Args:
        make: builds the scheduler on a stand-in optimizer; a scheduler that needs metrics is not known in advance and
            cannot be used.
        learning_rate: the optimizer's initial rate.
        steps: length of the table.
    """
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=learning_rate)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return tabulated(rates)
