"""The scorer that fits a bundle's model."""

from __future__ import annotations

from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.bundle.scoring.dlrm import DlrmScorer
from lazydp.components.bundle.scoring.two_tower import TwoTowerScorer
from lazydp.components.models.two_tower import TwoTower


def make_scorer(bundle: Bundle, *, approximate_from: int | None = None) -> Scorer:
    """The scorer for the bundle's model; from `approximate_from` items on with an approximate index, None never.

    Raises:
        InputError: the bundle has no items.
    """
    if isinstance(bundle.model, TwoTower):
        return TwoTowerScorer(bundle, approximate_from=approximate_from)
    return DlrmScorer(bundle)
