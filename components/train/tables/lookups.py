"""Which rows of which table a batch reads, in the shape the kernels want."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazydp.components.features.batch import Bags
from lazydp.components.features.pooling import lookup_weights
from lazydp.components.features.spec import ITEM, EmbeddedFeature
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.models.recommender import ModelInputs
from lazydp.components.train.data.examples import Examples
from lazydp.kernels import ops


@dataclass(frozen=True, slots=True)
class Lookups:
    """All lookups of one table by B examples, as F bags an example, feature by feature.

    Bag f * B + i is bag f of example i; a candidate feature counts as K bags an example.

    Attributes:
        indices: rows, int64 [N].
        offsets: int64 [F * B + 1].
        weights: weight of each lookup, float32 [N], or None where all are 1 (`features.pooling`).
        bags_per_example: F.
        on_host: the same lookups in host memory, where these are on a GPU and came from there.
    """

    indices: Tensor
    offsets: Tensor
    weights: Tensor | None
    bags_per_example: int
    on_host: Lookups | None = None

    @property
    def num_bags(self) -> int:
        """F * B."""
        return self.offsets.shape[0] - 1

    def weights_or_ones(self) -> Tensor:
        """Weight of each lookup, float32 [N]."""
        if self.weights is not None:
            return self.weights
        return torch.ones(self.indices.shape[0], device=self.indices.device)

    def tensors(self) -> tuple[Tensor, ...]:
        """Indices, offsets and, where there are any, weights."""
        return (self.indices, self.offsets) if self.weights is None else (self.indices, self.offsets, self.weights)

    def take(self, bags: Tensor, *, bags_per_example: int) -> Lookups:
        """The bags numbered `bags` (int64 [G], any order), in that order."""
        places = Bags(torch.arange(self.indices.shape[0]), self.offsets).take(bags)
        weights = None if self.weights is None else self.weights[places.values]
        return Lookups(self.indices[places.values], places.offsets, weights, bags_per_example)

    def without(self, row: int) -> Lookups:
        """Without the lookups of `row`; bags may be empty afterwards."""
        kept = self.indices != row
        before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        weights = None if self.weights is None else self.weights[kept]
        return Lookups(self.indices[kept], before[self.offsets], weights, self.bags_per_example)

    def averaged(self) -> Lookups:
        """With weights that make the sum of a bag its mean."""
        of_bag = 1.0 / self.offsets.diff().clamp(min=1).to(torch.float32)
        weights = of_bag[ops.bag_ids(self.offsets, num_lookups=self.indices.shape[0])]
        return Lookups(self.indices, self.offsets, weights, self.bags_per_example)


def lookups_of(layout: FeatureLayout, examples: Examples) -> dict[str, Lookups]:
    """The lookups of `examples`, by table in the order of `FeatureLayout.tables`."""
    by_table: dict[str, list[Lookups]] = {}
    for feature in layout.example:
        by_table.setdefault(feature.table, []).append(_of_feature(feature, examples.bags[feature.name], 1))
    for feature in layout.candidate:
        bags = examples.candidate_bags[feature.name]
        by_table.setdefault(feature.table, []).append(_of_feature(feature, bags, examples.num_candidates))
    return {
        table: join_lookups(parts, bags_per_example=sum(part.bags_per_example for part in parts))
        for table, parts in by_table.items()
    }


def _of_feature(feature: EmbeddedFeature, bags: Bags, bags_per_example: int) -> Lookups:
    return Lookups(bags.values, bags.offsets, lookup_weights(bags, feature.pooling), bags_per_example)


def join_lookups(parts: Sequence[Lookups], *, bags_per_example: int) -> Lookups:
    """The lookups of several reads of one table, one after the other."""
    if len(parts) == 1:
        return parts[0]
    weights = None
    if any(part.weights is not None for part in parts):
        weights = join([part.weights_or_ones() for part in parts])
    return Lookups(
        join([part.indices for part in parts]),
        join_offsets([part.offsets for part in parts], [part.indices.shape[0] for part in parts]),
        weights,
        bags_per_example,
    )


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenation, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def join_offsets(parts: Sequence[Tensor], lookups: Sequence[int]) -> Tensor:
    """Offsets of concatenated bags, from those of each part and its number of lookups.

    (The number is the last offset, but to read that from a GPU the host would have to wait.)
    """
    if len(parts) == 1:
        return parts[0]
    shifted = [parts[0]]
    base = lookups[0]
    for offsets, count in zip(parts[1:], lookups[1:], strict=True):
        shifted.append(offsets[1:] + base)
        base += count
    return torch.cat(shifted)


def model_inputs(
    layout: FeatureLayout, examples: Examples, pooled: Mapping[str, Tensor], *, with_items: bool = False
) -> ModelInputs:
    """Pooled rows of each table [F * B, D], cut into the features that the model reads.

    The cut is one `split` a table: its backward writes the gradient of all features in one pass. `with_items` adds the
    codes of the candidates, which only a model with a prior reads.
    """
    size = examples.size
    widths: dict[str, list[int]] = {}
    for feature in layout.example:
        widths.setdefault(feature.table, []).append(size)
    for feature in layout.candidate:
        widths.setdefault(feature.table, []).append(size * examples.num_candidates)
    parts = {table: iter(torch.split(pooled[table], width)) for table, width in widths.items()}
    return ModelInputs(
        example={feature.name: next(parts[feature.table]) for feature in layout.example},
        candidate={
            feature.name: next(parts[feature.table]).view(examples.num_candidates, size, -1).transpose(0, 1)
            for feature in layout.candidate
        },
        dense=examples.dense,
        item_dense=examples.item_dense,
        items=_codes(examples) if with_items else None,
    )


def _codes(examples: Examples) -> Tensor:
    """Codes of the candidates, int64 [B, K], where the dense layers compute: the bag of an item is its code."""
    codes = examples.candidate_bags[ITEM].values.view(examples.num_candidates, examples.size)
    return codes.t().to(examples.labels.device)
