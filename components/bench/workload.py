"""What a training step is measured on: a model, its tables, and the batches of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lazydp.components.models.recommender import Recommender
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.mechanism.parameters import UserGradient

FLOAT_BYTES = 4


class Workload(Protocol):
    """A model, its tables and its batches; sizes in bytes and operations are of one step."""

    @property
    def expected_batch_size(self) -> float:
        """b, which divides the gradient."""

    @property
    def user_gradient(self) -> UserGradient | None:
        """What is clipped where users are sampled."""

    @property
    def table_bytes(self) -> int:
        """Of all tables."""

    def figures(self) -> dict[str, int]:
        """The size of it, by name, for the results."""

    def model(self) -> Recommender:
        """The dense layers, the same ones at every call."""

    def weights(self) -> dict[str, Tensor]:
        """Initial weights of every table."""

    def batch(self, number: int) -> Sequence[Examples]:
        """The micro-batches of step `number`, from 1."""

    def embedding_bytes(self) -> int:
        """Table rows that a sparse step reads and writes: every lookup read once, every distinct row updated once."""

    def matmul_flops(self) -> int | None:
        """Operations of the matrix products; None where they were not counted."""
