"""The caller's optimizer, as `make_private_with_epsilon` reads it: tables to one linear step, the rest stays as it is.

The optimizer stays the caller's object, so that schedulers that were attached to it go on working. Its dense parameters
stay in their groups, with their rates and options. The tables leave it: their noise is delayed, and they are trained by
`EmbeddingSgd` with the rate that their group has at each step, whatever scheduler sets it. That rate is recorded, for
the noise that a row misses depends on the rates that it missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.tables.precision import LEAST_PART
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd

_FIXED = ("momentum", "weight_decay")
_TO_BE_GIVEN = (
    "give embeddings=EmbeddingSgd(learning_rate, momentum=..., weight_decay=...) for them; the other parameters keep "
    "the optimizer"
)


class GroupRates:
    """The learning rates of the tables' parameter group: those of past steps as they were, the present one as it is.

    A schedule of `EmbeddingSgd`.

    Args:
        optimizer: the caller's.
        group: number of the parameter group that holds the tables.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: int) -> None:
        self._optimizer, self._number = optimizer, group
        self._fixed = {name: self._group[name] for name in _FIXED}
        self.past: list[float] = []

    @property
    def _group(self) -> dict[str, Any]:
        # Looked up each time: a loaded state puts other objects there.
        return self._optimizer.param_groups[self._number]

    def __call__(self, step: int) -> float:
        if step <= len(self.past):
            return self.past[step - 1]
        rate = float(self._group["lr"])
        # What a scheduler will set is not known. Whether one float32 holds the tables is decided at the beginning:
        # for the least rate that matters.
        scheduled = "initial_lr" in self._group and step > len(self.past) + 1
        return rate * LEAST_PART if scheduled else rate

    def take(self, step: int) -> None:
        """Record the group's rate as that of `step`, which is about to be done.

        Raises:
            InputError: something changed momentum or weight decay.
        """
        for name, value in self._fixed.items():
            if self._group[name] != value:
                raise InputError(
                    f"a scheduler changed {name} of the embedding layers from {value} to {self._group[name]}: their "
                    f"rate alone may change (OneCycleLR: cycle_momentum=False), or {_TO_BE_GIVEN}"
                )
        self.past[step - 1 :] = [float(self._group["lr"])]


def embedding_rates(optimizer: torch.optim.Optimizer, tables: Mapping[str, Tensor]) -> tuple[EmbeddingSgd, GroupRates]:
    """The linear step of the tables, out of the caller's optimizer.

    Args:
        optimizer: the caller's.
        tables: weight of each embedding layer, by its name; at least one.

    Raises:
        InputError: the optimizer does something else than SGD to them, or different things to some.
    """
    name = type(optimizer).__name__
    if type(optimizer) is not torch.optim.SGD:
        raise InputError(
            f"the optimizer {name} cannot train the embedding layers {_named(tables)}: their noise is delayed, and a "
            f"delayed step must be linear in its noise, as that of SGD is; {_TO_BE_GIVEN}"
        )
    number = _group_of(optimizer, tables)
    group = optimizer.param_groups[number]
    for option in ("nesterov", "maximize", "dampening"):
        if group[option]:
            raise InputError(
                f"SGD with {option}={group[option]} cannot train the embedding layers {_named(tables)}: delayed noise "
                f"is worked out for plain momentum; leave {option} out, or {_TO_BE_GIVEN}"
            )
    if any(optimizer.state.get(weight) for weight in tables.values()):
        raise InputError(
            f"the optimizer has a state for the embedding layers {_named(tables)}, from steps without privacy or of "
            "another training: make a new optimizer"
        )
    rates = GroupRates(optimizer, number)
    return EmbeddingSgd(rates, momentum=group["momentum"], weight_decay=group["weight_decay"]), rates


def _group_of(optimizer: torch.optim.Optimizer, tables: Mapping[str, Tensor]) -> int:
    wanted = {id(weight) for weight in tables.values()}
    groups = enumerate(optimizer.param_groups)
    found = [number for number, group in groups if not wanted.isdisjoint(map(id, group["params"]))]
    if len(found) != 1:
        raise InputError(
            f"the embedding layers {_named(tables)} are in {len(found)} parameter groups of the optimizer, and all "
            f"tables share one rate: put them into one group, or {_TO_BE_GIVEN}"
        )
    return found[0]


def check_parameters(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, tables: Mapping[str, Tensor], may_lack: bool
) -> None:
    """Refuse an optimizer of other parameters than those that are trained.

    Args:
        module: the caller's.
        optimizer: the caller's.
        tables: weight of each embedding layer, by its name.
        may_lack: whether tables need not be in it, because `embeddings` says how they are trained.

    Raises:
        InputError: a parameter by its name, or a kind of optimizer that no private step can drive.
    """
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise InputError(
            f"the optimizer {type(optimizer).__name__} cannot be used: a private step gives dense gradients, once; "
            "take SGD, Adam, Adagrad or another of torch.optim"
        )
    inside = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {id(parameter) for parameter in module.parameters()}
    if inside - own:
        raise InputError(
            f"the optimizer holds {len(inside - own)} parameters that are none of the module's: they would be trained "
            "without clipping and noise; make the optimizer of module.parameters(), after the module is on its device"
        )
    excused = {id(weight) for weight in tables.values()} if may_lack else set()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside | excused:
            raise InputError(
                f"parameter {name!r} requires a gradient and is not in the optimizer: add it, or freeze it with "
                "requires_grad_(False)"
            )


def without_tables(optimizer: torch.optim.Optimizer, tables: Mapping[str, Tensor]) -> None:
    """Take the tables out of the optimizer, in place; its groups stay, and so do schedulers."""
    theirs = {id(weight) for weight in tables.values()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in theirs]


def _named(tables: Mapping[str, Tensor]) -> str:
    return ", ".join(map(repr, tables))
