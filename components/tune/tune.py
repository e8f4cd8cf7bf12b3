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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lazydp.components.budget.accounting.tuning import UNIFORM_BITS, Tuning
from lazydp.components.evaluate.user_scores import check_scorable
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import InputError, PrivacyError
from lazydp.components.shared.files import PRIVATE_FILE, read_json, sync_directory, write_json
from lazydp.components.shared.version import code_version
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.sampler import Keystream
from lazydp.components.train.run.costs import RunCost, calibrated_noise_multiplier
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.settings_check import check_fits, contribution_bound
from lazydp.components.train.run.spending import close_without_release, reserve
from lazydp.components.tune.sweep import HeldOut, Public, Sweep, with_settings
from lazydp.components.tune.trials import score_of, try_settings
from lazydp.kernels.noise_key import NoiseKey

BEST = "best"
_FORMAT_VERSION = 1
_SWEEP = "sweep.json"
# What defines the mechanism that is accounted for, or how it is stated.
_FIXED = ("privacy_unit", "target_epsilon", "target_delta", "publish_every")

_log = logging.getLogger("lazydp.tune")


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
    run_id: str | None = None,
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
        run_id: names the sweep in the ledger, so that a retry elsewhere is the same sweep; None for a fresh name.
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
        identity = _begin(out, data, config, tuning, resume=resume, run_id=run_id)
        if held.root_key() is None and not (out / BEST).is_dir():
            held.keep_root_key(NoiseKey.generate() if test_key is None else NoiseKey.for_tests(test_key))
        _check_settings(identity, sweep, data)
        if (out / BEST).is_dir():
            held.destroy_keys()
            return _tuned(out)
        root = held.root_key()
        assert root is not None
        if not _drew_nothing(out):  # such a sweep is closed in the ledger already, or is closed below
            reserve(ledger, identity, data, key=root.commitment())
        trials = _drawn(out, identity, sweep, root)
        if not trials:
            bound = contribution_bound(data)
            close_without_release(ledger, identity, max_examples_per_user=bound, key=root.commitment())
            raise PrivacyError(
                f"sweep {identity.run_id} drew no trial (with mean {sweep.mean_trials:g}, the {sweep.distribution} "
                "distribution gives 0 now and then): there is nothing to release, and its charge stays; "
                "start another one in another folder"
            )
        for number, settings in enumerate(trials, start=1):
            _log.info("[private] trial %d of %d: %s", number, len(trials), settings)
            try_settings(out / f"trial-{number:05d}", identity, settings, data, scored_on, ledger, held)
        _choose(out, identity, len(trials))
        root.destroy()
        held.destroy_keys()  # the best trial's folder has it, for the export to show that the run is the sweep's
        return _tuned(out)


def sweep_identity(run_id: str, data: EncodedDataset, config: TrainConfig, sweep: Sweep) -> RunIdentity:
    """What the ledger reserves for a sweep, before there is a folder or a key: the pipeline's gate asks for it.

    Args:
        run_id: names the sweep.
        data: what ingest wrote.
        config: what the trials share.
        sweep: what to try.

    Raises:
        InputError: a setting is unknown, not valid, or part of the mechanism.
        PrivacyError: no score of the kind asked for is private.
    """
    tuning = _tuning(config, sweep, data, _scored_on(data, sweep))
    sigma = calibrated_noise_multiplier(config, contribution_bound(data), tuning=tuning)
    identity = _identity(run_id, data, config, tuning, sigma, code_version())
    _check_settings(identity, sweep, data)
    return identity


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
        check_scorable(data, sweep.metric)
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
    check_scorable(public, sweep.metric)
    return public


def _tuning(config: TrainConfig, sweep: Sweep, data: EncodedDataset, scored_on: EncodedDataset) -> Tuning:
    if not config.private:
        raise InputError("mode sgd has no privacy to account for: tune it by hand")
    check_fits(data, config)
    if config.publish_every is not None:
        raise InputError("publish_every: the snapshots of a trial would be releases of their own; leave it out")
    if config.minimum_quality is not None:
        raise InputError("minimum_quality: a sweep keeps its best trial, whatever its score; leave it out")
    told = json.dumps([config.digest(), sweep.model_dump(mode="json")], sort_keys=True)
    return Tuning(
        distribution=sweep.distribution,
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
    event = RunCost.of(identity, bound).of_run()
    for name, values in sweep.settings.items():
        for value in values:
            changed = with_settings(identity.config, {name: value})
            if name in _FIXED or not changed.private or RunCost(changed, bound).of_run() != event:
                raise InputError(
                    f"settings: {name} is part of the mechanism that is accounted for, and must be the same in every "
                    "trial; set it in the training configuration, and run a sweep for each value that matters"
                )


# --- the sweep's folder ----------------------------------------------------------------------------------------


def _begin(
    out: Path, data: EncodedDataset, config: TrainConfig, tuning: Tuning, *, resume: bool, run_id: str | None
) -> RunIdentity:
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
        if {name: held.get(name) for name in given} != given or run_id not in (None, held["run_id"]):
            raise InputError(
                f"{out} holds another sweep: resume it with the configuration, sweep, dataset and lazydp version that "
                "it was started with, or use another folder"
            )
        return _identity(held["run_id"], data, config, tuning, held["noise_multiplier"], version)
    sigma = calibrated_noise_multiplier(config, contribution_bound(data), tuning=tuning)
    run_id = run_id or f"tune-{uuid.uuid4().hex[:16]}"
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


def _drew_nothing(out: Path) -> bool:
    """Whether the number of trials was drawn before, and is 0."""
    return bool(read_json(out / _SWEEP, format_version=_FORMAT_VERSION, what="sweep")["trials"] == [])


def _choose(out: Path, identity: RunIdentity, trials: int) -> None:
    """Keep the best trial and destroy the others; a kill at any moment leaves what the same call finishes.

    Raises:
        PrivacyError: no trial gave a finite model.
    """
    document = read_json(out / _SWEEP, format_version=_FORMAT_VERSION, what="sweep")
    if document["best"] is None:
        scores = {}
        for number in range(1, trials + 1):
            scores[number] = score_of(out / f"trial-{number:05d}")
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
