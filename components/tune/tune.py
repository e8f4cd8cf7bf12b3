"""`lazydp train --tune`: choose settings by trials, as one private mechanism (conditions: `budget.accounting.tuning`).

    reserve   what the whole sweep may at most spend, in the ledger, before anything is drawn or trained
    draw      the number of trials from its distribution, and each one's settings uniformly; kept, so that a resumed
              sweep goes on with them
    trials    each a run of its own key in a folder of its own, resumable like any run, then scored
    choose    the best score; the others' keys, weights and scores are destroyed
    release   `lazydp export` of the one folder that is left, charged once, as the sweep

One key stands behind a sweep: the reservation is bound to it, the draws and every trial's key are derived from it, so a
copied sweep can only repeat itself. It is destroyed at export.

A trial is private together with its score: the score is noised and its noise accounted for, or it comes from public
data. The noise of a score is a function of the trial's key, so a killed scoring repeats itself and tells nothing new.
The number of trials, and how the others did, are not told outside the sweep's private folder: not to the ledger, nor to
the bundle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lazydp.components.budget.accounting.epsilon import calibrate_noise_multiplier
from lazydp.components.budget.accounting.tuning import UNIFORM_BITS, Law, Metric, Tuning
from lazydp.components.bundle.manifest import first_problem
from lazydp.components.evaluate.user_scores import user_scores
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import InputError, NonFiniteError, PrivacyError
from lazydp.components.shared.files import PRIVATE_FILE, read_json, sync_directory, write_json
from lazydp.components.shared.version import code_version
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.sampler import Keystream
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.spending import close_without_release, reserve
from lazydp.components.train.run.train import build_engine, check_fits, contribution_bound, key_of, train
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey

BEST = "best"
_FORMAT_VERSION = 1
_SWEEP, _SCORE = "sweep.json", "score.json"
# What defines the mechanism that is accounted for, or how it is stated.
_FIXED = ("privacy_unit", "target_epsilon", "target_delta", "publish_every")

_log = logging.getLogger("lazydp.tune")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HeldOut(_Frozen):
    """Score on the dataset's own held-out split: the sum over users of scores in [0, 1], noised.

    Attributes:
        noise_multiplier: standard deviation of that noise. The sum grows with the users and its noise does not: 20 is
            0.02 of a score's mean over 1,000 users, and costs less privacy than most trainings.
    """

    kind: Literal["held_out"]
    noise_multiplier: Annotated[float, Field(ge=0)]


class Public(_Frozen):
    """Score on another dataset, which is declared public.

    Attributes:
        dataset: the folder that `lazydp ingest` made of it, with the same feature spec.
    """

    kind: Literal["public"]
    dataset: Path


class Sweep(_Frozen):
    """What to try.

    Attributes:
        law: of the number of trials.
        mean_trials: its mean.
        metric: what the trials are compared by.
        score: on what.
        settings: dotted name of a setting of the training configuration -> values, of which each trial draws one.
    """

    format_version: Literal[1] = 1
    law: Law = "poisson"
    mean_trials: Annotated[float, Field(ge=1, le=10_000)]
    metric: Metric = "ndcg_at_10"
    score: Annotated[HeldOut | Public, Field(discriminator="kind")]
    settings: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]

    @classmethod
    def load(cls, path: Path) -> Sweep:
        """Read a YAML file.

        Raises:
            InputError: it cannot be read or is not valid; one line that names the file and the field.
        """
        try:
            document = yaml.safe_load(path.read_text())
        except OSError as error:
            raise InputError(f"sweep {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"sweep {path} is not YAML: {' '.join(str(error).split())}") from error
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise InputError(f"sweep {path}: {first_problem(error)}") from error


@dataclass(frozen=True, slots=True)
class Tuned:
    """A sweep that is over.

    Attributes:
        run_id: of the sweep, in the ledger.
        folder: of the run to release.
        settings: that the best trial drew; part of what the mechanism releases.
        score: of the best trial; with its noise, or of public data.
    """

    run_id: str
    folder: Path
    settings: dict[str, Any]
    score: float


def tune(
    *,
    dataset: Path,
    config: TrainConfig,
    sweep: Sweep,
    out: Path,
    ledger: str | None = None,
    resume: bool = False,
    test_key: int | None = None,
) -> Tuned:
    """Try settings, and leave the best run in `out`/best, to be released by `export`.

    Args:
        dataset: what ingest wrote.
        config: what the trials share; `target_epsilon`, where given, is that of the whole sweep.
        sweep: what to try.
        out: folder of the sweep, private.
        ledger: URL of the ledger; None for the default one.
        resume: go on with the sweep in `out`, if there is one, instead of refusing.
        test_key: seed of keys made for tests; the result is then not private.

    Raises:
        InputError: `out` holds something else, or a setting is unknown, not valid, or part of the mechanism.
        PrivacyError: no score of the kind asked for is private; or no trial was drawn, or none gave a finite model,
            so that there is nothing to release.
        BudgetExceededError: the dataset's budget does not admit the sweep.
    """
    data = EncodedDataset.open(dataset)
    scored_on = _scored_on(data, sweep)
    tuning = _tuning(config, sweep, data, scored_on)
    with RunFolder.locked(out, create=True) as held:
        if held.identity() is not None:
            raise InputError(f"{out} holds a run: name a folder of its own for the sweep")
        identity = _begin(out, data, config, tuning, resume=resume)
        if held.root_key() is None and not (out / BEST).is_dir():
            held.keep_root_key(NoiseKey.generate() if test_key is None else NoiseKey.for_tests(test_key))
        _check_settings(identity, sweep, data)
        if (out / BEST).is_dir():
            held.destroy_keys()
            return _tuned(out)
        root = held.root_key()
        assert root is not None
        reserve(ledger, identity, data, key=root.commitment())
        trials = _drawn(out, identity, sweep, root)
        if not trials:
            bound = contribution_bound(data)
            close_without_release(ledger, identity, max_examples_per_user=bound, key=root.commitment())
            raise PrivacyError(
                f"sweep {identity.run_id} drew no trial (of mean {sweep.mean_trials:g}, the law {sweep.law} does so "
                "now and then): there is nothing to release, and its charge stays; start another one in another folder"
            )
        for number, settings in enumerate(trials, start=1):
            _log.info("[private] trial %d of %d: %s", number, len(trials), settings)
            _try(out / f"trial-{number:05d}", identity, settings, data, scored_on, ledger, held)
        _choose(out, identity, len(trials))
        root.destroy()
        held.destroy_keys()  # the best trial's folder has it, for the export to show that the run is the sweep's
        return _tuned(out)


# --- what is asked for -----------------------------------------------------------------------------------------


def _scored_on(data: EncodedDataset, sweep: Sweep) -> EncodedDataset:
    """The dataset that trials are scored on.

    Raises:
        PrivacyError: scores on it are private by nothing.
    """
    if isinstance(sweep.score, HeldOut):
        if sweep.score.noise_multiplier == 0:
            raise PrivacyError(
                "score.noise_multiplier is 0: scores on held-out rows read the same users as training does, and "
                "training's privacy does not cover them, so a sweep that compares them exactly is not private; give "
                "noise (for example 20), or score on a public dataset (score: {kind: public, dataset: ...})"
            )
        return data
    public = EncodedDataset.open(sweep.score.dataset)
    same = public.manifest.fingerprint == data.manifest.fingerprint
    if same or public.manifest.source.digest == data.manifest.source.digest:
        raise PrivacyError(
            f"score.dataset {sweep.score.dataset} was made from the rows that are trained on: it is not public; "
            "score on it with noise (score: {kind: held_out, noise_multiplier: 20})"
        )
    if public.spec.document() != data.spec.document():
        raise InputError(f"score.dataset {sweep.score.dataset} has another feature spec than dataset {data.path}")
    return public


def _tuning(config: TrainConfig, sweep: Sweep, data: EncodedDataset, scored_on: EncodedDataset) -> Tuning:
    if not config.private:
        raise InputError("mode sgd has no privacy to account for: tune it by hand")
    check_fits(data, config)
    if config.publish_every is not None:
        raise InputError("publish_every: the snapshots of a trial would be releases of their own; leave it out")
    told = json.dumps([config.digest(), sweep.model_dump(mode="json")], sort_keys=True)
    return Tuning(
        law=sweep.law,
        mean_trials=sweep.mean_trials,
        metric=sweep.metric,
        score_noise_multiplier=sweep.score.noise_multiplier if isinstance(sweep.score, HeldOut) else None,
        public_dataset=scored_on.manifest.fingerprint if isinstance(sweep.score, Public) else None,
        digest=hashlib.sha256(told.encode()).hexdigest(),
    )


def _check_settings(identity: RunIdentity, sweep: Sweep, data: EncodedDataset) -> None:
    """Every value must be valid, and leave the mechanism of a trial what it is: all trials have one event.

    Raises:
        InputError: the message names the setting.
    """
    bound = contribution_bound(data)
    event = identity.dp_event(bound)
    for name, values in sweep.settings.items():
        for value in values:
            changed = with_settings(identity.config, {name: value})
            if name in _FIXED or not changed.private or changed.dp_event(bound) != event:
                raise InputError(
                    f"settings: {name} is part of the mechanism that is accounted for, and must be the same in every "
                    "trial; set it in the training configuration, and run a sweep for each value that matters"
                )


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`config` with settings replaced, each by its dotted name.

    Raises:
        InputError: an unknown setting, or a value that is not valid.
    """
    document = config.model_dump()
    for name, value in settings.items():
        node: dict[str, Any] = document
        *path, last = name.split(".")
        for part in path:
            inner = node.get(part)
            node = inner if isinstance(inner, dict) else {}
        if last not in node:
            raise InputError(f"settings: the training configuration has no setting {name!r}")
        node[last] = value
    return TrainConfig.parse(document, where="(with the settings of the sweep)")


# --- the sweep's folder ----------------------------------------------------------------------------------------


def _begin(out: Path, data: EncodedDataset, config: TrainConfig, tuning: Tuning, *, resume: bool) -> RunIdentity:
    """What every trial is, but for its settings: the sweep that `out` holds, or a new one."""
    version = code_version()
    given = {"digest": tuning.digest, "dataset_fingerprint": data.manifest.fingerprint, "code_version": version}
    file = out / _SWEEP
    if file.exists():
        held = read_json(file, format_version=_FORMAT_VERSION, what="sweep")
        if not resume:
            raise InputError(
                f"{out} holds sweep {held['run_id']}: say --resume to go on with it, or use another folder"
            )
        if {name: held.get(name) for name in given} != given:
            raise InputError(
                f"{out} holds another sweep: resume it with the configuration, sweep, dataset and lazydp version that "
                "it was started with, or use another folder"
            )
        return _identity(held["run_id"], data, config, tuning, held["noise_multiplier"], version)
    if config.noise_multiplier is not None:
        sigma = config.noise_multiplier
    else:
        sigma = _calibrated(config, tuning, contribution_bound(data))
    run_id = f"tune-{uuid.uuid4().hex[:16]}"
    document = {"run_id": run_id, **given, "noise_multiplier": sigma, "trials": None, "best": None}
    write_json(file, document, format_version=_FORMAT_VERSION, mode=PRIVATE_FILE)
    return _identity(run_id, data, config, tuning, sigma, version)


def _identity(
    run_id: str, data: EncodedDataset, config: TrainConfig, tuning: Tuning, sigma: float, version: str
) -> RunIdentity:
    return RunIdentity(
        run_id=run_id,
        config=config.with_changes(noise_multiplier=sigma, target_epsilon=None),
        dataset_fingerprint=data.manifest.fingerprint,
        code_version=version,
        noise_multiplier=sigma,
        tuning=tuning,
    )


def _calibrated(config: TrainConfig, tuning: Tuning, bound: int | None) -> float:
    """Sigma at which the whole sweep stays within (target_epsilon, target_delta)."""
    assert config.target_epsilon is not None
    assert config.target_delta is not None
    return calibrate_noise_multiplier(
        target_epsilon=config.target_epsilon,
        target_delta=config.target_delta,
        make_event=lambda sigma: tuning.event(config.dp_event(bound, noise_multiplier=sigma)),
    )


def _drawn(out: Path, identity: RunIdentity, sweep: Sweep, key: NoiseKey) -> list[dict[str, Any]]:
    """The settings of every trial: drawn once from the sweep's key, and the same ever after."""
    file = out / _SWEEP
    document = read_json(file, format_version=_FORMAT_VERSION, what="sweep")
    if document["trials"] is None:
        assert identity.tuning is not None
        high, low = Keystream(key.derive("number of trials"), stream=0).words(2).tolist()
        number = identity.tuning.number_of_trials((high << (UNIFORM_BITS // 2)) | low)
        settings = Keystream(key.derive("settings of trials"), stream=0)
        document["trials"] = [
            {name: values[int(settings.below(len(values), 1)[0])] for name, values in sweep.settings.items()}
            for _ in range(number)
        ]
        write_json(file, document, format_version=_FORMAT_VERSION, mode=PRIVATE_FILE)
    found: list[dict[str, Any]] = document["trials"]
    return found


def _try(
    folder: Path,
    identity: RunIdentity,
    settings: Mapping[str, Any],
    data: EncodedDataset,
    scored_on: EncodedDataset,
    ledger: str | None,
    held: RunFolder,
) -> None:
    """Train and score one trial, unless that was done before."""
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


def _choose(out: Path, identity: RunIdentity, trials: int) -> None:
    """Keep the best trial and destroy the others; a kill at any moment leaves what the same call finishes.

    Raises:
        PrivacyError: no trial gave a finite model.
    """
    document = read_json(out / _SWEEP, format_version=_FORMAT_VERSION, what="sweep")
    if document["best"] is None:
        scores = {}
        for number in range(1, trials + 1):
            file = out / f"trial-{number:05d}" / _SCORE
            scores[number] = read_json(file, format_version=_FORMAT_VERSION, what="score")["score"]
        finite = {number: score for number, score in scores.items() if score is not None and math.isfinite(score)}
        if not finite:
            raise PrivacyError(
                f"no trial of sweep {identity.run_id} gave a finite model: there is nothing to release, and its charge "
                "stays; try smaller learning rates in another sweep"
            )
        number, score = max(finite.items(), key=lambda trial: trial[1])
        document |= {"best": number, "score": score}
        write_json(out / _SWEEP, document, format_version=_FORMAT_VERSION, mode=PRIVATE_FILE)
    best = out / f"trial-{document['best']:05d}"
    for trial in sorted(out.glob("trial-*")):
        if trial != best:
            with RunFolder.locked(trial) as folder:
                folder.erase()
    with RunFolder.locked(best) as folder:
        kept = folder.identity()
        assert kept is not None
        folder.begin(replace(kept, selected=True))
    best.rename(out / BEST)
    sync_directory(out)


def _tuned(out: Path) -> Tuned:
    document = read_json(out / _SWEEP, format_version=_FORMAT_VERSION, what="sweep")
    settings = document["trials"][document["best"] - 1]
    return Tuned(document["run_id"], out / BEST, settings, document["score"])
