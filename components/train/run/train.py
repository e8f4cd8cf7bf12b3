"""One training run, from top to bottom: reserve the budget, step, checkpoint, stop."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lazydp.components.budget.accounting.events import event_to_json
from lazydp.components.budget.accounting.tuning import Tuning
from lazydp.components.features.spec import FeatureSpec
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.build import build_model
from lazydp.components.models.recommender import Recommender, addressed_tables
from lazydp.components.shared.errors import InputError, PrivacyError
from lazydp.components.shared.progress import Progress
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.loader import Prefetcher
from lazydp.components.train.device.placement import HOST, Placement
from lazydp.components.train.device.processor import processor
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.ranks.ranks import Alone, Ranks, most
from lazydp.components.train.run.background import BackgroundWriter
from lazydp.components.train.run.batches import BatchMaker, batch_maker, sampler_of
from lazydp.components.train.run.beginning import begin_from
from lazydp.components.train.run.begun import (
    begin_run,
    check_same,
    exported,
    followed_key,
    opened,
    refuse_number_of_ranks,
)
from lazydp.components.train.run.checkpoint import Checkpoint
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.popularity_loss import popularity_loss
from lazydp.components.train.run.private_log import PrivateLog
from lazydp.components.train.run.settings_check import contribution_bound, warn_of_settings
from lazydp.components.train.run.shards import Shards
from lazydp.components.train.run.spending import check_event, ledger_of, reserve, take_lease
from lazydp.components.train.run.termination import TerminatedError, Termination
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

_log = logging.getLogger("lazydp.train")


class Publish(Protocol):
    """Releases the model as it stands (`export.publish`): flushes it in place, keeps a checkpoint, publishes."""

    def __call__(
        self, engine: Engine, identity: RunIdentity, key: NoiseKey, data: EncodedDataset, *, keep: Callable[[], None]
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run that stands at some step, and may be over.

    Attributes:
        folder: private; what `lazydp export` takes.
        identity: of the run.
        step: steps done.
    """

    folder: Path
    identity: RunIdentity
    step: int


def train(
    *,
    dataset: Path,
    config: TrainConfig,
    out: Path,
    ledger: str | None = None,
    resume: bool = False,
    run_id: str | None = None,
    key: NoiseKey | None = None,
    tuning: Tuning | None = None,
    trial: int | None = None,
    publish: Publish | None = None,
    ranks: Ranks | None = None,
) -> TrainedRun:
    """Train, or go on training, until `config.steps` steps are done.

    The budget is reserved in the ledger before the first step, under the run's id: a run that is killed and resumed is
    the same run, and is charged once.

    Args:
        dataset: what ingest wrote.
        config: public settings.
        out: the run's folder, private (mode 0700).
        ledger: URL of the ledger; None for the default one.
        resume: go on with the run in `out`, if there is one, instead of refusing.
        run_id: names the run in the ledger, so that a retry elsewhere is the same run; None for a fresh name.
        key: the root key of a new run; None for a fresh secret one. Tests give one made for tests, a sweep its own.
        tuning: the sweep that this is a trial of (`tune`); `run_id` and `key` are then the sweep's.
        trial: which trial of the sweep it is.
        publish: releases snapshots; given exactly where the configuration has `publish_every`.
        ranks: that train the run together, each calling this with the same arguments; `out` is a folder that all share.
            None: this process alone.

    Raises:
        InputError: `out` holds another run, or one that was exported, or the dataset doesn't fit the configuration.
        BudgetExceededError: the dataset's budget does not admit the run.
        UnavailableError: the configuration asks for a GPU, and there is none.
        PrivacyError: the dataset has no budget, or the batches are not drawn as the run is charged, or the run's
            reservation is bound to another noise key.
    """
    placement = config.placement()
    if (publish is None) != (config.publish_every is None):
        raise InputError(
            "publish_every says how often snapshots are released, --publish-to where: give both or neither"
        )
    ranks = ranks or Alone()
    refuse_number_of_ranks(ranks.size, config)
    data = EncodedDataset.open(dataset)
    if not ranks.rank:
        warn_of_settings(data, config)

    def begin(folder: RunFolder) -> RunIdentity:
        return begin_run(folder, data, config, resume=resume, run_id=run_id, tuning=tuning, trial=trial)

    with opened(out, ranks, data, config, begin) as (folder, identity):
        model = build_model(data.spec, identity.config.model)
        shards = None if config.distributed is None else Shards.of(model, ranks)
        checkpoint = latest_of(folder, identity, data, shards)
        if checkpoint is not None:
            _check_move(identity.config, config, began_on=checkpoint.processor)
        if not ranks.rank:
            root = root_key_of(checkpoint, folder, identity) if checkpoint is not None else folder.root_key() or key
            root = root or NoiseKey.generate()
            folder.keep_root_key(root)
            check = _claim(ledger, folder, identity, data, root, distributed=shards is not None)
            shards = shards and replace(shards, check=check)
            ranks.tell({"reserved": True})
        else:
            ranks.tell(None)  # until rank 0 has reserved the budget, no other rank reads the key
            root = followed_key(folder)
        secret = identity.noise_key(root)
        batches = batch_maker(data, config, secret, ranks=ranks)
        places = None if shards is None else shards.places()
        tables = begin_from(model, data, identity, secret, places=places) if checkpoint is None else None
        engine = engine_for(model, identity, secret, tables=tables, placement=placement, ranks=ranks)
        if checkpoint is None:
            folder.save(_checkpoint(engine, identity, secret, data), shards)
        else:
            engine.load_state_dict(checkpoint.state)
        _loop(engine, identity, secret, data, batches, folder, publish, shards)
        secret.destroy()
        root.destroy()
        return TrainedRun(out, identity, engine.steps_done)


def _claim(
    ledger: str | None,
    folder: RunFolder,
    identity: RunIdentity,
    data: EncodedDataset,
    root: NoiseKey,
    *,
    distributed: bool,
) -> Callable[[], None] | None:
    """Reserve what a private run may spend; of a distributed one, return what says whether it still holds its lease."""
    config = identity.config
    if not config.private:
        return None
    check_event(
        sampler_of(data, config, identity.noise_key(root)), identity, max_examples_per_user=contribution_bound(data)
    )
    reserve(ledger, identity, data, key=root.commitment())
    if not identity.ledger:
        folder.begin(replace(identity, ledger=ledger_of(ledger)))
    return take_lease(ledger, identity) if distributed else None


def _loop(
    engine: Engine,
    identity: RunIdentity,
    secret: NoiseKey,
    data: EncodedDataset,
    make_batches: BatchMaker,
    folder: RunFolder,
    publish: Publish | None,
    shards: Shards | None,
) -> None:
    """Step until the last step; nothing of the loop outlives it, however it ends."""
    config = identity.config
    log = PrivateLog(identity, contribution_bound(data), popularity=lambda: popularity_loss(data, config))
    ranks: Ranks = Alone() if shards is None else shards.ranks
    beside = None if shards is None else replace(shards, ranks=ranks.another())
    writer = BackgroundWriter(folder, memory_limit=_snapshot_limit(), shards=beside)

    def is_snapshot(step: int) -> bool:
        return config.publish_every is not None and 0 < step < config.steps and step % config.publish_every == 0

    def keep() -> None:
        folder.save(_checkpoint(engine, identity, secret, data), shards)

    if publish is not None and is_snapshot(engine.steps_done):
        # Killed while it released this one, perhaps: that ends before the next step begins.
        publish(engine, identity, secret, data, keep=keep)
    batches = Prefetcher(make_batches, first=engine.steps_done + 1, last=config.steps)
    remaining = config.steps - engine.steps_done
    progress_bar = nullcontext() if ranks.rank else Progress("train", total=remaining, unit="steps")
    with Termination() as termination, writer, batches, progress_bar as progress:
        for step, micro_batches in batches:
            report = engine.step(micro_batches)
            if progress is not None:
                progress.advance(note=log.note(report))
            ends = bool(most(ranks, torch.tensor([termination.requested]), purpose="termination"))
            if publish is not None and is_snapshot(step):
                writer.close()
                publish(engine, identity, secret, data, keep=keep)
            elif step % config.checkpoint_every == 0 or step == config.steps or ends:
                check_same(engine, ranks)
                writer.save(_checkpoint(engine, identity, secret, data))
            if ends:
                break
    if engine.steps_done < config.steps:
        raise TerminatedError(
            f"run {identity.run_id} was told to end (SIGTERM) at step {engine.steps_done} of {config.steps} and kept a "
            "checkpoint: the same command goes on from there (`lazydp train --resume`, a retry of the task)"
        )


def _check_move(begun: TrainConfig, given: TrainConfig, *, began_on: str | None) -> None:
    """A run that goes on elsewhere is the same mechanism, and no longer the same bits: tell, or refuse.

    Args:
        begun: configuration that the run began with.
        given: configuration that it goes on with.
        began_on: processor that wrote the checkpoint; None where it does not say.

    Raises:
        InputError: it releases snapshots. Were its last checkpoint damaged, it would repeat steps under the noise of a
            snapshot that is out, and sums that differ from the snapshot's by their rounding would share that noise.
    """
    where = [
        f"device {config.device}, table_device {config.table_device or config.device}, processor {rounds_by}"
        for config, rounds_by in ((begun, began_on or processor()), (given, processor()))
    ]
    if where[0] == where[1]:
        return
    moved = f"was computed with {where[0]}; it would go on with {where[1]}"
    if begun.publish_every is not None:
        raise InputError(
            f"the run {moved}: a run that releases snapshots goes on where it began, to the same bits "
            "(ATEN_CPU_CAPABILITY, LAZYDP_SIMD and OMP_NUM_THREADS choose the processor's)"
        )
    _log.warning(
        "the run %s: from here on sums are rounded in another order, and it will not end in the bits of an "
        "undisturbed run; its privacy is the same",
        moved,
    )


def latest_of(
    folder: RunFolder, identity: RunIdentity, data: EncodedDataset, shards: Shards | None = None
) -> Checkpoint | None:
    """The checkpoint that the run goes on from, or is released from; None before the first.

    Args:
        folder: of the run.
        identity: of the run.
        data: what it is trained on.
        shards: of a run that several ranks train: each gets its own rows. None: all rows.

    Raises:
        IntegrityError: none is whole, or the latest is another run's.
        PrivacyError: it spent something else than this run would have by then.
    """
    checkpoint = folder.latest(shards)
    if checkpoint is None:
        return None
    expected = _event_after(checkpoint.step, identity, data)
    if checkpoint.event != expected:
        raise PrivacyError(
            f"the checkpoint of step {checkpoint.step} in {folder.path} was trained as {json.dumps(checkpoint.event)}, "
            f"and run {identity.run_id} is charged for {json.dumps(expected)}: it can neither go on nor be released"
        )
    return checkpoint


def key_of(checkpoint: Checkpoint, folder: RunFolder) -> NoiseKey:
    """The key of the run.

    Raises:
        InputError: it was destroyed at export.
    """
    if checkpoint.key is None:
        raise InputError(exported(folder))
    return checkpoint.key


def root_key_of(checkpoint: Checkpoint, folder: RunFolder, identity: RunIdentity) -> NoiseKey:
    """The key that the run's reservation is bound to, which the checkpoint's own key must come from.

    Raises:
        InputError: it was destroyed at export.
        PrivacyError: the checkpoint was written under another key.
    """
    key = key_of(checkpoint, folder)
    root = folder.root_key()
    if root is None:
        return key  # an older lazydp kept it in the checkpoints alone
    if identity.noise_key(root).commitment() != key.commitment():
        raise PrivacyError(
            f"the checkpoint of step {checkpoint.step} in {folder.path} was written under another noise key than that "
            f"of run {identity.run_id}: it can neither go on nor be released"
        )
    return root


def build_engine(spec: FeatureSpec, identity: RunIdentity, secret: NoiseKey, placement: Placement = HOST) -> Engine:
    """The engine of a run, at step 0; on the host whatever the configuration says, unless it is given a placement."""
    return engine_for(build_model(spec, identity.config.model), identity, secret, placement=placement)


def engine_for(
    model: Recommender,
    identity: RunIdentity,
    secret: NoiseKey,
    *,
    tables: Mapping[str, Tensor] | None = None,
    placement: Placement = HOST,
    ranks: Ranks | None = None,
) -> Engine:
    """The engine of a run with another model than the configured one (an audit's), or other initial `tables`."""
    config = identity.config
    if tables is None and config.distributed is not None:
        tables = addressed_tables(model, Shards.of(model, ranks or Alone()).places())
    return Engine(
        model,
        mode=config.mode,
        privacy=config.privacy_parameters(identity.noise_multiplier),
        embeddings=embedding_optimizer(config),
        dense=DenseOptimizer.named(
            config.dense.optimizer,
            learning_rate=config.dense.schedule.rates(config.dense.learning_rate, steps=config.steps),
            **config.dense.options,
        ),
        key=secret.derive("noise"),
        tables=tables,
        placement=placement,
        ranks=ranks,
        arrangement=config.arrangement,
    )


def embedding_optimizer(config: TrainConfig) -> EmbeddingSgd:
    """The optimizer of the tables."""
    settings = config.embeddings
    return EmbeddingSgd(
        learning_rate=settings.schedule.rates(settings.learning_rate, steps=config.steps),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _checkpoint(engine: Engine, identity: RunIdentity, secret: NoiseKey, data: EncodedDataset) -> Checkpoint:
    step = engine.steps_done
    return Checkpoint(
        step=step,
        state=engine.state_dict(),
        event=_event_after(step, identity, data),
        key=secret,
        processor=processor(),
    )


def _event_after(step: int, identity: RunIdentity, data: EncodedDataset) -> dict[str, Any] | None:
    """What the run is to the accountant once `step` steps are done, as JSON; None without privacy."""
    if not identity.config.private:
        return None
    return event_to_json(RunCost.of(identity, contribution_bound(data)).of_run(steps=step))


def _snapshot_limit() -> int:
    """Bytes of state that may be copied aside: an eighth of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
