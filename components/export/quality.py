"""Whether a finished model may be released by its quality: one noised comparison, which the run's event holds.

The comparison is S = sum over users of (score by the model - c * score by the released counts), with c the run's
`over_popularity`. Model and counts are released with noise already, so for either of them fixed S reads each user's own
rows alone, and a user's figure is in [-c, 1]: one privacy unit, come, gone or changed, moves S by at most 1 + c. S gets
noise of noise_multiplier * (1 + c), and what anybody learns is its sign. So the decision is post-processing of a
Gaussian mechanism, composed with those before (`RunCost.of_run`), and it costs the same whichever way it falls.

The noise is a function of the run's key, so an export that was killed decides the same again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from lazydp.components.evaluate.user_scores import scores_over_popularity
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.recommender import Recommender
from lazydp.components.train.release_settings import MinimumQuality
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

_log = logging.getLogger("lazydp.export")


def reaches(
    minimum: MinimumQuality,
    data: EncodedDataset,
    *,
    model: Recommender,
    tables: Mapping[str, Tensor],
    counts: Tensor,
    key: NoiseKey,
) -> bool:
    """Whether the model reaches what is asked, by a noised comparison; to be published only if the run is charged.

    Args:
        minimum: what is asked.
        data: with held-out examples.
        model: dense layers, as released.
        tables: flushed weights by table name, as released.
        counts: noised counts of items, as released; float32 [num_items + 1].
        key: the run's noise key.

    Raises:
        InputError: nothing is held out.
    """
    figures = scores_over_popularity(
        data,
        model=model,
        tables=tables,
        counts=counts,
        metric=minimum.metric,
        over_popularity=minimum.over_popularity,
    )
    drawn = torch.empty(1, 1)
    ops.normal_(drawn, key.derive("minimum quality").tensor(), table=0, first_row=0, step=0)
    noised = float(figures.sum()) + minimum.noise_multiplier * minimum.sensitivity * float(drawn)
    _log.info("[private] %s over popularity, noised sum over users: %.4g", minimum.metric, noised)
    return noised >= 0
