"""What the gate asks the ledger to reserve: a run, or a whole sweep, before either has a folder or a key."""

from __future__ import annotations

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.version import code_version
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import calibrated_noise_multiplier
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.settings_check import check_fits, contribution_bound
from lazydp.components.tune.sweep import Sweep
from lazydp.components.tune.tune import sweep_identity


def identity_of(run_id: str, data: EncodedDataset, config: TrainConfig, *, sweep: str = "") -> RunIdentity:
    """The run that `train` will begin under this name, or the sweep that `tune` will.

    Args:
        run_id: its name.
        data: what ingest wrote.
        config: of the run, or what the trials of the sweep share; private.
        sweep: what to try, as YAML text; empty for a single run.

    Raises:
        InputError: configuration or sweep does not fit the dataset, or is not valid.
        PrivacyError: the sweep's score would be private by nothing.
    """
    if sweep:
        return sweep_identity(run_id, data, config, Sweep.parse_text(sweep, where="(parameter sweep)"))
    check_fits(data, config)
    return RunIdentity(
        run_id=run_id,
        config=config,
        dataset_fingerprint=data.manifest.fingerprint,
        code_version=code_version(),
        noise_multiplier=calibrated_noise_multiplier(config, contribution_bound(data)),
    )
