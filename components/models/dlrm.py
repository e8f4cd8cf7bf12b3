"""DLRM: a bottom network over dense features, pairwise dot products of all vectors, a top network over those."""

from __future__ import annotations

import torch
from torch import Tensor

from lazydp.components.models.config import DlrmConfig
from lazydp.components.models.interaction import PairwiseDots
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.models.mlp import mlp
from lazydp.components.models.recommender import ModelInputs, Recommender
from lazydp.components.shared.errors import InputError


class Dlrm(Recommender):
    """Deep learning recommendation model (Naumov et al. 2019, arXiv 1906.00091).

    Vectors of one candidate: the bottom network's output, every example-side bag, every candidate-side bag and, with
    dense item features, a second bottom network's output. The top network reads the first of them and the dot
    products of all pairs.

    Raises:
        InputError: the layout has no feature to read.
    """

    def __init__(self, layout: FeatureLayout, config: DlrmConfig) -> None:
        super().__init__(layout, config)
        dim = config.embedding_dim
        self.bottom = mlp(layout.num_dense, config.bottom_widths, dim) if layout.num_dense else None
        self.item_bottom = mlp(layout.num_item_dense, config.bottom_widths, dim) if layout.num_item_dense else None
        if not layout.features and not layout.num_dense:
            raise InputError("a DLRM needs at least one feature, the feature spec has none")
        vectors = len(layout.features) + (self.bottom is not None) + (self.item_bottom is not None)
        self.interaction = PairwiseDots(vectors)
        self.top = mlp(dim + self.interaction.num_pairs, config.top_widths, 1)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Logits [B, K] of the candidates."""
        vectors = self._vectors(inputs)  # [B, K, V, D]
        pairs = self.interaction(vectors.flatten(0, 1))
        features = torch.cat([vectors[:, :, 0], pairs.view(*vectors.shape[:2], pairs.shape[1])], dim=2)
        logits: Tensor = self.top(features)
        return logits.squeeze(2)

    def _vectors(self, inputs: ModelInputs) -> Tensor:
        example = [inputs.example[feature.name] for feature in self.layout.example]
        if self.bottom is not None:
            example.insert(0, self.bottom(inputs.dense))
        candidate = [inputs.candidate[feature.name] for feature in self.layout.candidate]
        if self.item_bottom is not None:
            candidate.append(self.item_bottom(inputs.item_dense))
        if not candidate:
            return torch.stack(example, dim=1).unsqueeze(1)
        of_candidates = torch.stack(candidate, dim=2)
        if not example:
            return of_candidates
        of_examples = torch.stack(example, dim=1).unsqueeze(1)
        return torch.cat([of_examples.expand(-1, of_candidates.shape[1], -1, -1), of_candidates], dim=2)
