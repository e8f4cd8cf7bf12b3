"""One trial of a sweep: a run of its own key in a folder of its own, then scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lazydp.components.evaluate.user_scores import user_scores
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import NonFiniteError
from lazydp.components.shared.files import PRIVATE_FILE, read_json, write_json
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.train import build_engine, key_of, train
from lazydp.components.tune.sweep import with_settings
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

_FORMAT_VERSION = 1
_SCORE = "score.json"


def try_settings(
    folder: Path,
    identity: RunIdentity,
    settings: Mapping[str, Any],
    data: EncodedDataset,
    scored_on: EncodedDataset,
    ledger: str | None,
    held: RunFolder,
) -> None:
    """Train and score one trial, unless that was done before; `held` is the sweep's folder, with its key."""
    if (folder / _SCORE).exists():
        return
    number = int(folder.name.rpartition("-")[2])
    train(
        dataset=data.path,
        config=with_settings(identity.config, settings),
        out=folder,
        ledger=ledger,
        resume=True,
        run_id=identity.run_id,
        key=held.root_key(),
        tuning=identity.tuning,
        trial=number,
    )
    write_json(folder / _SCORE, {"score": _score(folder, scored_on)}, format_version=_FORMAT_VERSION, mode=PRIVATE_FILE)


def _score(trial: Path, scored_on: EncodedDataset) -> float | None:
    """The score of a finished trial; None for a model that is not finite, which is never the best.

    The flush happens in memory alone: the checkpoint keeps its pending noise, and export will draw the same.
    """
    with RunFolder.locked(trial) as folder:
        identity, checkpoint = folder.identity(), folder.latest()
        assert identity is not None
        assert identity.tuning is not None
        assert checkpoint is not None
        key = key_of(checkpoint, folder)
        engine = build_engine(scored_on.spec, identity, key)
        engine.load_state_dict(checkpoint.state)
        engine.flush()
        try:
            tables = engine.table_weights()
        except NonFiniteError:
            return None
        scores = user_scores(scored_on, model=engine.model, tables=tables, metric=identity.tuning.metric)
        sigma = identity.tuning.score_noise_multiplier
        if sigma is None:
            return float(scores.mean())
        return float(scores.sum()) + sigma * _standard_normal(key.derive("score"))


def _standard_normal(key: NoiseKey) -> float:
    drawn = torch.empty(1, 1)
    ops.normal_(drawn, key.tensor(), table=0, first_row=0, step=0)
    return float(drawn)


def score_of(trial: Path) -> float | None:
    """The score of a trial that was tried; None for a model that is not finite."""
    score: float | None = read_json(trial / _SCORE, format_version=_FORMAT_VERSION, what="score")["score"]
    return score
