"""The model that `lazydp train` and `export` make of a configuration with steps, without ledger, files or release."""

from __future__ import annotations

from lazydp.components.evaluate.scoring import Scorer, catalogue_scorer
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.build import build_model
from lazydp.components.shared.version import code_version
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.batches import batch_maker
from lazydp.components.train.run.beginning import begin_from
from lazydp.components.train.run.costs import calibrated_noise_multiplier
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.settings_check import check_fits, contribution_bound
from lazydp.components.train.run.train import engine_for
from lazydp.kernels.noise_key import NoiseKey


def trained(data: EncodedDataset, config: TrainConfig, key: NoiseKey) -> Scorer:
    """Train from beginning to end, flush, and score by the flushed tables.

    Args:
        data: with items.
        config: of the run; a start's vectors are what its steps begin from.
        key: the run's noise key.

    Raises:
        InputError: the dataset lacks what the configuration needs.
    """
    check_fits(data, config)
    sigma = calibrated_noise_multiplier(config, contribution_bound(data)) if config.private else None
    identity = RunIdentity("bench", config, data.manifest.fingerprint, code_version(), noise_multiplier=sigma)
    model = build_model(data.spec, config.model)
    engine = engine_for(model, identity, key, tables=begin_from(model, data, identity, key))
    batches = batch_maker(data, config, key)
    for step in range(1, config.steps + 1):
        engine.step(batches(step))
    engine.flush()
    return catalogue_scorer(model, engine.table_weights(), data.items)
