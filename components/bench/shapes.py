"""The shapes that a training step is measured on: a model, its tables, and batches made for them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lazydp.components.bench.workload import FLOAT_BYTES
from lazydp.components.features.batch import Bags, Batch
from lazydp.components.features.spec import EmbeddedFeature
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.models.recommender import Recommender
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.huge_pages import huge_pages_in_use
from lazydp.components.train.data.examples import Examples

_NUM_DENSE = 13
_SCATTER = 1_000_003
"""A prime: frequent rows lie anywhere in a table."""

Access = Literal["uniform", "zipf"]
"""How the rows of a batch are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """A DLRM over tables of one size, each read by one sum bag of `pooling` rows.

    Uniform rows are the hardest case for lazy noise: fewest lookups share a row, so most rows have to catch up.
    """

    tables: int
    rows: int
    dim: int
    batch_size: int
    pooling: int
    bottom_widths: tuple[int, ...]
    top_widths: tuple[int, ...]
    access: Access = "uniform"

    @property
    def layout(self) -> FeatureLayout:
        """One feature for each table."""
        names = [f"table{number}" for number in range(self.tables)]
        features = tuple(EmbeddedFeature(name=n, table=n, num_rows=self.rows, pooling="sum") for n in names)
        return FeatureLayout(features, (), _NUM_DENSE)

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables."""
        return self.tables * self.rows * self.dim * FLOAT_BYTES

    def model(self) -> Recommender:
        """The dense layers, with initial weights from a fixed seed."""
        config = DlrmConfig(embedding_dim=self.dim, bottom_widths=self.bottom_widths, top_widths=self.top_widths)
        return build_model(self.layout, config)

    def weights(self) -> dict[str, torch.Tensor]:
        """Initial weights of every table."""
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.empty(self.rows, self.dim).uniform_(-0.05, 0.05, generator=generator)
            for name in self.layout.tables(self.dim)
        }

    @property
    def expected_batch_size(self) -> float:
        """The batch is always full."""
        return float(self.batch_size)

    @property
    def user_gradient(self) -> None:
        """Examples are clipped one by one."""
        return

    def figures(self) -> dict[str, int]:
        """Rows are those of each table."""
        return {
            "tables": self.tables,
            "rows": self.rows,
            "dim": self.dim,
            "examples": self.batch_size,
            "pooling": self.pooling,
            "threads": torch.get_num_threads(),
            "huge_pages": int(huge_pages_in_use()),
        }

    def batch(self, number: int) -> Sequence[Examples]:
        """Step `number`: one batch, of its own."""
        return [self.examples(number)]

    def examples(self, seed: int) -> Examples:
        """A batch of its own for each seed."""
        generator = torch.Generator().manual_seed(seed)
        size, lookups = self.batch_size, self.batch_size * self.pooling
        offsets = torch.arange(0, lookups + 1, self.pooling)
        bags = {feature.name: Bags(self._drawn(lookups, generator), offsets) for feature in self.layout.example}
        labels = torch.randint(0, 2, (size,), generator=generator).float()
        dense = torch.randn(size, _NUM_DENSE, generator=generator)
        return Examples.of(Batch(size=size, labels=labels, dense=dense, bags=bags, item=None, user_index=None))

    def _drawn(self, lookups: int, generator: torch.Generator) -> torch.Tensor:
        """Row numbers, int64 [lookups]; by Zipf's law the k-th row by frequency is drawn in proportion to 1 / k."""
        if self.access == "uniform":
            return torch.randint(0, self.rows, (lookups,), generator=generator)
        # (rows + 1)^u of a uniform u lies between k and k + 1 with probability log(1 + 1 / k) / log(rows + 1).
        ranks = (self.rows + 1.0) ** torch.rand(lookups, generator=generator, dtype=torch.float64)
        ranks = ranks.long().clamp(max=self.rows) - 1
        return ranks * _SCATTER % self.rows

    def matmul_flops(self) -> int:
        """Operations of the matrix products of one step: forward, input gradients, weight gradients."""
        vectors = self.tables + 1
        pairs = vectors * (vectors - 1) // 2
        bottom = [_NUM_DENSE, *self.bottom_widths, self.dim]
        top = [self.dim + pairs, *self.top_widths, 1]
        multiplied = sum(a * b for widths in (bottom, top) for a, b in itertools.pairwise(widths))
        first = bottom[0] * bottom[1]  # dense features have no gradient
        interaction = vectors * vectors * self.dim
        return 2 * self.batch_size * (3 * multiplied - first + 2 * interaction)

    def embedding_bytes(self) -> int:
        """Bytes of table rows that a step reads and writes: every lookup read once, every row updated once."""
        lookups = self.tables * self.batch_size * self.pooling
        distinct = self.tables * round(self.rows * (1.0 - (1.0 - 1.0 / self.rows) ** (self.batch_size * self.pooling)))
        return (lookups + 2 * distinct) * self.dim * FLOAT_BYTES


SHAPES = {
    "mlperf": StepShape(
        tables=26,
        rows=200_000,
        dim=128,
        batch_size=2048,
        pooling=1,
        bottom_widths=(512, 256),
        top_widths=(1024, 1024, 512, 256),
    ),
    "pooled": StepShape(
        tables=10, rows=200_000, dim=32, batch_size=2048, pooling=80, bottom_widths=(256, 128), top_widths=(256, 64)
    ),
    "small": StepShape(tables=3, rows=1000, dim=8, batch_size=64, pooling=2, bottom_widths=(16,), top_widths=(16,)),
}


def shape_of(name: str, *, rows: int | None = None) -> StepShape:
    """The shape called `name`, with another number of rows for each table where given.

    Raises:
        InputError: there is no such shape.
    """
    if name not in SHAPES:
        raise InputError(f"no shape {name!r}: choose one of {', '.join(SHAPES)}")
    return SHAPES[name] if rows is None else replace(SHAPES[name], rows=rows)
