"""What a run begins from: weights of the public seed, or a start; and the prior, where the model has one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lazydp.components.features.spec import ITEM
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.recommender import Recommender, addressed_tables, initial_tables
from lazydp.components.models.two_tower import TwoTower
from lazydp.components.onepass.start import log_counts, one_pass
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.popularity import exact_counts, noise_of_counts, noised_counts
from lazydp.kernels.noise_key import NoiseKey


def begin_from(
    model: Recommender,
    data: EncodedDataset,
    identity: RunIdentity,
    secret: NoiseKey,
    *,
    places: Mapping[str, range] | None = None,
) -> dict[str, Tensor]:
    """Tables that the run begins with; the prior of `model`, where it has one, is set in place.

    What is read of the data here is charged by the event of the run (`RunCost.of_run`). It is read again only where the
    run was killed before its first checkpoint, then under the same key, and to the same bits.

    Args:
        model: of the run.
        data: what it is trained on.
        identity: of the run.
        secret: its noise key.
        places: of the rows that this rank owns, by table; None for a run of one process.

    Raises:
        InputError: the dataset lacks what a start or the counts need.
    """
    config = identity.config
    noise = config.start_noise(identity.noise_multiplier)
    tables = initial_tables(model) if places is None else addressed_tables(model, places)
    if noise is not None:
        start = one_pass(data, config.privacy_unit, noise, secret, dim=config.model.embedding_dim)
        tables[ITEM] = start.vectors
        _set_prior(model, start.prior)
    elif model.has_prior:
        counts = noised_counts(data, config, secret)
        std = noise_of_counts(data, config)
        _set_prior(model, log_counts(counts if counts is not None else exact_counts(data, config), std=std))
    return tables


def _set_prior(model: Recommender, prior: Tensor) -> None:
    assert isinstance(model, TwoTower)
    with torch.no_grad():
        model.prior.copy_(prior)
