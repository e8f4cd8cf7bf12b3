"""Settings of what a run releases beside its weights, and of what decides whether it releases anything."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lazydp.components.budget.accounting.limits import SMALLEST_NOISE
from lazydp.components.onepass.rules import HISTOGRAM_SHARE
from lazydp.components.shared.frozen_model import FrozenModel


class PopularityCounts(FrozenModel):
    """Counts of items, released with noise beside the model: what the service answers those it knows nothing of.

    Attributes:
        noise_multiplier: standard deviation of the noise on every count, over the most by which one privacy unit moves
            all counts together (`popularity.sensitivity`).
    """

    noise_multiplier: Annotated[float, Field(ge=SMALLEST_NOISE, allow_inf_nan=False)]


class StartSettings(FrozenModel):
    """A start: noised counts and item vectors from a few passes over the histories, before the first step (`onepass`).

    Attributes:
        histogram_share: of the start's squared mu, what the counts take; the statistics have the rest.
        noise_multiplier: sigma of the whole start, where steps follow; without steps it is the run's.
    """

    histogram_share: Annotated[float, Field(gt=0, lt=1)] = HISTOGRAM_SHARE
    noise_multiplier: Annotated[float, Field(ge=SMALLEST_NOISE, allow_inf_nan=False)] | None = None


class MinimumQuality(FrozenModel):
    """A noised comparison with popularity on held-out rows; every epsilon of the run covers it, passed or not.

    Attributes:
        metric: scores a user's held-out items, in [0, 1].
        over_popularity: the least score of the model, as a multiple of that of the released counts.
        noise_multiplier: standard deviation of the noise on what is compared (the sum over users of the model's score
            less `over_popularity` times that of the counts), over the most by which one privacy unit moves it.
    """

    metric: Literal["auc", "hit_at_10", "ndcg_at_10"] = "ndcg_at_10"
    over_popularity: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    noise_multiplier: Annotated[float, Field(ge=SMALLEST_NOISE, allow_inf_nan=False)]

    @property
    def sensitivity(self) -> float:
        """The most by which one privacy unit moves the sum: a user's figure is in [-over_popularity, 1]."""
        return 1.0 + self.over_popularity
