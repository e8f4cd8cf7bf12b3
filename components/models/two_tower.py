"""Two towers: a user vector and an item vector that meet in a dot product."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lazydp.components.models.config import TwoTowerConfig
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.models.mlp import mlp
from lazydp.components.models.recommender import ModelInputs, Recommender
from lazydp.components.shared.errors import InputError


class TwoTower(Recommender):
    """User tower over example-side features, item tower over item-side features; score = dot / temperature.

    Raises:
        InputError: the layout has no example-side or no item-side input, so one tower would have nothing to read.
    """

    def __init__(self, layout: FeatureLayout, config: TwoTowerConfig) -> None:
        super().__init__(layout, config)
        dim = config.embedding_dim
        user_inputs = len(layout.example) * dim + layout.num_dense
        item_inputs = len(layout.candidate) * dim + layout.num_item_dense
        if not user_inputs or not item_inputs:
            side = "user, context or history" if not user_inputs else "item"
            raise InputError(f"a two-tower model needs at least one {side} feature, the feature spec has none")
        self.user_tower = mlp(user_inputs, config.user_widths, dim)
        self.item_tower = mlp(item_inputs, config.item_widths, dim)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits [B, K] of the candidates."""
        user = self.user_vector(inputs.example, inputs.dense)
        items = self.item_vector(inputs.candidate, inputs.item_dense)
        return self.score(user, items)

    def user_vector(self, example: Mapping[str, Tensor], dense: Tensor) -> Tensor:
        """Vectors [B, D] of users, from pooled example-side features [B, D] each and dense [B, n]."""
        pooled = [example[feature.name] for feature in self.layout.example]
        vector: Tensor = self.user_tower(torch.cat([*pooled, dense], dim=-1))
        return vector

    def item_vector(self, candidate: Mapping[str, Tensor], item_dense: Tensor) -> Tensor:
        """Vectors [..., D] of items, from pooled item-side features [..., D] each and item_dense [..., m]."""
        pooled = [candidate[feature.name] for feature in self.layout.candidate]
        vector: Tensor = self.item_tower(torch.cat([*pooled, item_dense], dim=-1))
        return vector

    def score(self, user: Tensor, items: Tensor) -> Tensor:
        """Scores [B, K] of items [B, K, D] for users [B, D]."""
        return torch.bmm(items, user.unsqueeze(2)).squeeze(2) / self.config.temperature

    config: TwoTowerConfig
