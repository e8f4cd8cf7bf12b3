"""How a run begins, or goes on: which run a folder holds, and whether it may be trained with what was given."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lazydp.components.budget.accounting.tuning import Tuning
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import InputError, IntegrityError
from lazydp.components.shared.version import code_version
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.lanes import lanes_of
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.ranks.ranks import Ranks, check_equal
from lazydp.components.train.run.costs import calibrated_noise_multiplier
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.settings_check import check_fits, contribution_bound
from lazydp.kernels.noise_key import NoiseKey

_log = logging.getLogger("lazydp.train")


def begin_run(
    folder: RunFolder,
    data: EncodedDataset,
    config: TrainConfig,
    *,
    resume: bool,
    run_id: str | None,
    tuning: Tuning | None,
    trial: int | None,
) -> RunIdentity:
    """The run that `folder` holds, or a new one.

    Raises:
        InputError: it holds another run, or one that was exported, or one that is not to be resumed; or the dataset
            doesn't fit the configuration.
    """
    check_fits(data, config)
    bound = contribution_bound(data)
    held = folder.identity()
    given = replace(
        _identity(data, config, run_id or (held.run_id if held is not None else _new_run_id())),
        noise_multiplier=held.noise_multiplier if held is not None else None,
        tuning=tuning,
        trial=trial,
    )
    differences = held.differences(given) if held is not None else []
    if held is not None and folder.has_checkpoint():
        if folder.key_destroyed():
            raise InputError(exported(folder))
        if not resume:
            raise InputError(
                f"{folder.path} holds run {held.run_id}: say --resume to go on with it, or use another folder"
            )
        if differences:
            raise InputError(
                f"{folder.path} holds another run (given != its own): {'; '.join(differences)}. "
                "Resume it with what it was started with, or train into another folder"
            )
        return held
    if held is not None and not differences:
        return held  # refused its budget, or killed before its first checkpoint
    given = replace(given, run_id=run_id or _new_run_id())
    if config.private:
        if config.noise_multiplier is None:
            _log.info("calibrating noise for epsilon %g at delta %g", config.target_epsilon, config.target_delta)
        given = replace(given, noise_multiplier=calibrated_noise_multiplier(config, bound))
    folder.destroy_keys()  # of another run that was refused its budget here
    folder.begin(given)
    return given


def _new_run_id() -> str:
    return f"run-{uuid.uuid4().hex[:16]}"


def _identity(data: EncodedDataset, config: TrainConfig, run_id: str) -> RunIdentity:
    return RunIdentity(
        run_id=run_id,
        config=config,
        dataset_fingerprint=data.manifest.fingerprint,
        code_version=code_version(),
        noise_multiplier=None,
        dataset_files=data.files_digest(),
    )


def exported(folder: RunFolder) -> str:
    """What there is to say of a run that was exported."""
    return (
        f"{folder.path} was exported, and its noise key destroyed: it can neither be resumed nor exported again; "
        "train a new run into another folder"
    )


# ---- several ranks ----


def refuse_number_of_ranks(ranks: int, config: TrainConfig) -> None:
    """Refuse to train on `ranks` ranks what is not laid out for them.

    Raises:
        InputError: the configuration says nothing of ranks, or its lanes do not divide among them.
    """
    if ranks > 1 and config.distributed is None:
        raise InputError(
            f"{ranks} ranks were started, and the configuration is that of a run of one process: add "
            "`distributed: {}` to it (docs/distributed.md)"
        )
    lanes_of(0, lanes=config.lanes, ranks=ranks)


@contextlib.contextmanager
def opened(
    out: Path, ranks: Ranks, data: EncodedDataset, config: TrainConfig, begin: Callable[[RunFolder], RunIdentity]
) -> Iterator[tuple[RunFolder, RunIdentity]]:
    """The folder of the run, which rank 0 holds and begins, and the run.

    Raises:
        InputError: rank 0 cannot begin it; or on another rank, `out` is not that folder, or dataset, configuration or
            lazydp are others than those of rank 0.
    """
    if not ranks.rank:
        with RunFolder.locked(out, create=True) as folder:
            identity = begin(folder)
            ranks.tell({"run": identity.run_id})
            ranks.check_together("begin")
            yield folder, identity
        return
    run_id = ranks.tell(None)["run"]
    folder = RunFolder.followed(out)
    yield folder, _followed(folder, ranks, _identity(data, config, run_id))


def _followed(folder: RunFolder, ranks: Ranks, given: RunIdentity) -> RunIdentity:
    held = folder.identity()
    differences = ["the folder is not there"] if held is None else held.differences(given)
    if held is None or differences:
        raise InputError(
            f"rank {ranks.rank} was started with something else than rank 0 (its own != that of rank 0): "
            f"{'; '.join(differences)}. Start all ranks with the same command, on the same files"
        )
    ranks.check_together("begin")
    return held


def followed_key(folder: RunFolder) -> NoiseKey:
    """The key that rank 0 keeps in the folder of the run; it never travels between ranks.

    Raises:
        IntegrityError: it is not there.
    """
    key = folder.root_key()
    if key is None:
        raise IntegrityError(f"{folder.path} has no noise key: --out is a folder that all ranks share")
    return key


def check_same(engine: Engine, ranks: Ranks) -> None:
    """Refuse to keep a checkpoint unless all ranks did the same steps to the same dense layers.

    Raises:
        PrivacyError: some did not; the message names them.
        UnavailableError: some do not come; the message names them.
    """
    if ranks.size == 1:
        return
    ranks.check_together(f"checkpoint of step {engine.steps_done}")
    check_equal(ranks, torch.tensor([engine.steps_done]), "step")
    check_equal(ranks, engine.dense.digest(), "state of the dense layers")
