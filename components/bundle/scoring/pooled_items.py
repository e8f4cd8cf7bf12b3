"""Pooled rows of every item of a catalogue, computed once from the released tables (post-processing, at no cost)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lazydp.components.features.batch import ItemCatalogue
from lazydp.components.features.spec import ITEM, EmbeddedFeature
from lazydp.components.models.recommender import Recommender, pool


def pooled_items(model: Recommender, tables: Mapping[str, Tensor], catalogue: ItemCatalogue) -> dict[str, Tensor]:
    """Pooled rows [num_items + 1, D] of each item-side feature, by item code."""

    def rows(feature: EmbeddedFeature) -> Tensor:
        # The bag of an item's id is the code itself: the table is its own pooling, and needs no copy.
        if feature.name == ITEM:
            return tables[feature.table]
        return pool([feature], tables, {feature.name: catalogue.bags[feature.name]})[feature.name]

    return {feature.name: rows(feature) for feature in model.layout.candidate}
