"""Scores of the whole catalogue for examples of the dataset, by a released model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lazydp.components.features.batch import Batch, ItemCatalogue
from lazydp.components.models.recommender import ModelInputs, Recommender, pool
from lazydp.components.models.two_tower import TwoTower

Scorer = Callable[[Batch], Tensor]
"""From B examples to scores [B, num_items + 1] by item code."""

# Pairs of example and item that the dense layers read at once: bounds memory at some hundred megabytes.
_PAIRS_AT_ONCE = 1 << 18


def catalogue_scorer(model: Recommender, tables: Mapping[str, Tensor], catalogue: ItemCatalogue) -> Scorer:
    """The fastest way to score every item for an example.

    Args:
        model: dense layers.
        tables: flushed weights by table name.
        catalogue: items to score, code 0 included.
    """
    if isinstance(model, TwoTower):
        return _TwoTowerScorer(model, tables, catalogue)
    return _PairScorer(model, tables, catalogue)


class _TwoTowerScorer:
    """Item vectors once, one product a batch."""

    def __init__(self, model: TwoTower, tables: Mapping[str, Tensor], catalogue: ItemCatalogue) -> None:
        self._model, self._tables = model, tables
        with torch.no_grad():
            pooled = pool(model.layout.candidate, tables, catalogue.bags)
            self._items = model.item_vector(pooled, catalogue.dense)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        users = self._model.user_vector(pool(self._model.layout.example, self._tables, batch.bags), batch.dense)
        return users @ self._items.T / self._model.config.temperature


class _PairScorer:
    """The dense layers over every pair, some examples at a time."""

    def __init__(self, model: Recommender, tables: Mapping[str, Tensor], catalogue: ItemCatalogue) -> None:
        self._model, self._tables, self._catalogue = model, tables, catalogue
        self._pooled = pool(model.layout.candidate, tables, catalogue.bags)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        items = self._catalogue.num_items + 1
        example = pool(self._model.layout.example, self._tables, batch.bags)
        at_once = max(1, _PAIRS_AT_ONCE // items)
        parts = []
        for start in range(0, batch.size, at_once):
            rows = slice(start, min(start + at_once, batch.size))
            count = rows.stop - rows.start
            inputs = ModelInputs(
                example={name: vectors[rows] for name, vectors in example.items()},
                candidate={name: vectors.expand(count, -1, -1) for name, vectors in self._pooled.items()},
                dense=batch.dense[rows],
                item_dense=self._catalogue.dense.expand(count, -1, -1),
            )
            parts.append(self._model(inputs))
        return torch.cat(parts) if parts else torch.empty(0, items)


def observed_scores(
    model: Recommender, tables: Mapping[str, Tensor], catalogue: ItemCatalogue | None, batch: Batch
) -> Tensor:
    """Score [B] of each example's own item (or of the example, where there are no items)."""
    dense = torch.empty(batch.size, 1, 0)
    candidate: dict[str, Tensor] = {}
    if catalogue is not None and batch.item is not None:
        dense, bags = catalogue.take(batch.item.unsqueeze(1))
        candidate = {name: vectors.unsqueeze(1) for name, vectors in pool(model.layout.candidate, tables, bags).items()}
    with torch.no_grad():
        example = pool(model.layout.example, tables, batch.bags)
        items = None if batch.item is None else batch.item.unsqueeze(1)
        logits: Tensor = model(
            ModelInputs(example=example, candidate=candidate, dense=batch.dense, item_dense=dense, items=items)
        )
    return logits.squeeze(1)
