"""Two towers: a user vector and an item vector that meet in a dot product."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lazydp.components.features.spec import HISTORY, ITEM
from lazydp.components.models.config import TwoTowerConfig
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.models.mlp import mlp
from lazydp.components.models.recommender import ModelInputs, Recommender
from lazydp.components.shared.errors import InputError


class TwoTower(Recommender):
    """User tower over example-side features, item tower over item-side features; score = dot / temperature (+ prior).

    With `user: history` (and a layout of that alone, `FeatureLayout.history_only`) there are no towers.

    With a prior, vectors have a column more: the item's prior, which meets the user's temperature there. So whatever
    ranks by dot products, an index too, ranks by the whole logit.

    Raises:
        InputError: the layout has no example-side or no item-side input, so one tower would have nothing to read; or
            a prior is asked for where there are no items.
    """

    prior: Tensor
    """Part of every logit that is never trained, float32 [num_items + 1] by item code."""

    def __init__(self, layout: FeatureLayout, config: TwoTowerConfig) -> None:
        super().__init__(layout, config)
        dim = config.embedding_dim
        self._has_towers = config.user == "features"
        self.has_prior = config.prior
        if self._has_towers:
            user_inputs = len(layout.example) * dim + layout.num_dense
            item_inputs = len(layout.candidate) * dim + layout.num_item_dense
            if not user_inputs or not item_inputs:
                side = "user, context or history" if not user_inputs else "item"
                raise InputError(f"a two-tower model needs at least one {side} feature, the feature spec has none")
            self.user_tower = mlp(user_inputs, config.user_widths, dim)
            self.item_tower = mlp(item_inputs, config.item_widths, dim)
        if config.prior:
            rows = next((feature.num_rows for feature in layout.candidate if feature.name == ITEM), None)
            if rows is None:
                raise InputError("prior: counts are of items, and the feature spec has none: leave the prior out")
            self.register_buffer("prior", torch.zeros(rows))

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits [B, K] of the candidates."""
        user = self.user_vector(inputs.example, inputs.dense)
        items = self.item_vector(inputs.candidate, inputs.item_dense, items=inputs.items)
        return self.score(user, items)

    def user_vector(self, example: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """Vectors [B, D] of users, from pooled example-side features [B, D] each and dense [B, n].

        With a prior [B, D + 1].
        """
        if self._has_towers:
            pooled = [example[feature.name] for feature in self.layout.example]
            vector: Tensor = self.user_tower(torch.cat([*pooled, dense], dim=-1))
        else:
            vector = example[HISTORY]
        if not self.has_prior:
            return vector
        return torch.cat([vector, vector.new_full((*vector.shape[:-1], 1), self.config.temperature)], dim=-1)

    def item_vector(
        self, candidate: Mapping[str, Tensor], item_dense: Tensor, *, items: Tensor | None = None
    ) -> Tensor:
        """Vectors [..., D] of items, from pooled item-side features [..., D] each and item_dense [..., m].

        With a prior [..., D + 1].

        Args:
            candidate: pooled features by name.
            item_dense: dense features.
            items: codes [...] of the items, for their prior; None for the whole catalogue in order of its codes.
        """
        if self._has_towers:
            pooled = [candidate[feature.name] for feature in self.layout.candidate]
            vector: Tensor = self.item_tower(torch.cat([*pooled, item_dense], dim=-1))
        else:
            vector = candidate[ITEM]
        if not self.has_prior:
            return vector
        prior = self.prior if items is None else self.prior[items]
        return torch.cat([vector, prior.unsqueeze(-1)], dim=-1)

    def score(self, user: Tensor, items: Tensor) -> Tensor:
        """Scores [B, K] of items [B, K, D] for users [B, D]."""
        return torch.bmm(items, user.unsqueeze(2)).squeeze(2) / self.config.temperature

    config: TwoTowerConfig
