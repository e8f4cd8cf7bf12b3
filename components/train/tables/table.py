"""One table in training: rows of one float32 or two, and the step that each is up to date with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazydp.components.shared.errors import FormatError
from lazydp.components.train.tables.second_float import TwoFloats


@dataclass(slots=True)
class Table:
    """The state of a table.

    Attributes:
        number: in the addresses of noise.
        weight: float32 [R, D].
        last: int32 [R], the last step whose noise each row contains.
        momentum: the velocity, float32 [R, D], or None.
        rest: what `weight` leaves of the true value, float32 [R, D]; None where rows have one float.
        momentum_rest: likewise of `momentum`.
        expected: how large weights are taken to become, from the initial ones: a public number.
        began_with_two: whether public numbers asked for two floats before the first step.
        constant: a row that no example reads, and that gets no noise (padding), or None.
        first_row: where these rows are a shard of a table, the number of row 0 in the table.
    """

    number: int
    weight: Tensor
    last: Tensor
    momentum: Tensor | None
    rest: Tensor | None = None
    momentum_rest: Tensor | None = None
    expected: float = 0.0
    began_with_two: bool = False
    constant: int | None = None
    first_row: int = 0

    @property
    def has_two_floats(self) -> bool:
        """Whether rows have a second float."""
        return self.rest is not None

    def two_floats(self) -> TwoFloats:
        """The rows as two floats from now on; those of one float are that with nothing in the second."""
        if self.rest is None:
            self.rest = torch.zeros_like(self.weight)
        if self.momentum is not None and self.momentum_rest is None:
            self.momentum_rest = torch.zeros_like(self.momentum)
        return TwoFloats(self.weight, self.rest, self.momentum, self.momentum_rest)

    def state(self) -> dict[str, Any]:
        """For a private checkpoint: references, not copies."""
        names = ("weight", "last", "momentum", "rest", "momentum_rest", "expected", "began_with_two")
        return {name: getattr(self, name) for name in names}

    def check(self, saved: Mapping[str, Any], name: str) -> None:
        """Refuse the state of another table.

        Raises:
            FormatError: another shape, or another optimizer.
        """
        if saved["weight"].shape != self.weight.shape or (saved["momentum"] is None) != (self.momentum is None):
            raise FormatError(
                f"the checkpoint's table {name!r} has shape {tuple(saved['weight'].shape)}, this run's "
                f"{tuple(self.weight.shape)}: it belongs to another model or optimizer"
            )

    def load(self, saved: Mapping[str, Any], *, older: Mapping[str, Any]) -> None:
        """Continue from `saved`, copied into these tensors.

        Args:
            saved: what `state` gave.
            older: what an older lazydp said of all tables together: `largest` and `two_floats`.
        """
        self.weight.copy_(saved["weight"])
        self.last.copy_(saved["last"])
        if self.momentum is not None:
            self.momentum.copy_(saved["momentum"])
        # Chosen from the initial weights, which a resumed run does not see: the state says.
        self.expected = saved.get("expected", older.get("largest")) or self.expected
        self.began_with_two = saved.get("began_with_two", older.get("two_floats", self.began_with_two))
        self.rest, self.momentum_rest = None, None
        if self.began_with_two or saved.get("rest") is not None:
            self.two_floats()
        for part in ("rest", "momentum_rest"):
            if saved.get(part) is not None:
                getattr(self, part).copy_(saved[part])
