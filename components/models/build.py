"""From a configuration to a model."""

from __future__ import annotations

import torch

from lazydp.components.features.spec import FeatureSpec
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.dlrm import Dlrm
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.models.recommender import Recommender
from lazydp.components.models.two_tower import TwoTower


def build_model(inputs: FeatureSpec | FeatureLayout, config: DlrmConfig | TwoTowerConfig) -> Recommender:
    """The model that `config` describes, for the features of `inputs`, with initial weights from the public seed.

    Raises:
        InputError: the features don't fit the model; see `FeatureLayout.tables`, `FeatureLayout.history_only` and
            `TwoTower`.
    """
    layout = inputs if isinstance(inputs, FeatureLayout) else FeatureLayout.of(inputs)
    # A fork, so that building a model neither reads nor moves the caller's random state.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        if isinstance(config, DlrmConfig):
            return Dlrm(layout, config)
        return TwoTower(layout.history_only() if config.user == "history" else layout, config)
