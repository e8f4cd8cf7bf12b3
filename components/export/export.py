"""The one way from private to public: flush, prove, state, commit, destroy the key, publish. Read `export` downwards.

A kill between any two steps leaves one of these, and the same command again finishes the export:

    before the commit     nothing spent, nothing visible; a staged folder at most, which is made anew
    after the commit      budget spent, nothing visible; the run's checkpoint still has its key, so it is staged anew
    after the key is gone the staged bundle is whole (it was synced before); it is only renamed
    after the rename      done

So the bundle never stands at its name without its commit in the ledger, nor beside a key that could undo its noise.
(Snapshots of a run that goes on are `publish`'s: their commits come first too, and their key lives until this export.)
"""

from __future__ import annotations

import datetime
import glob
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lazydp.components.audit.report import AuditReport
from lazydp.components.budget.statement import AuditResult, RealisedNoise
from lazydp.components.bundle.manifest import BundleManifest, Lineage
from lazydp.components.bundle.signature import read_signing_key, sign
from lazydp.components.bundle.writer import write_bundle
from lazydp.components.export.proof import PendingRows, prove_flushed
from lazydp.components.export.quality import reaches
from lazydp.components.export.realised import realised_noise
from lazydp.components.export.statement import statement_of
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.build import build_model
from lazydp.components.shared.errors import InputError, NotPrivateError, PrivacyError, QualityError
from lazydp.components.shared.files import (
    PRIVATE_DIRECTORY,
    PRIVATE_FILE,
    PUBLIC_DIRECTORY,
    read_json,
    sync_directory,
    write_json,
)
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.run.checkpoint import Checkpoint
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.popularity import noised_counts
from lazydp.components.train.run.settings_check import contribution_bound
from lazydp.components.train.run.spending import (
    UNREGISTERED,
    Standing,
    close_without_release,
    commit,
    standing,
    take_lease,
)
from lazydp.components.train.run.train import (
    embedding_optimizer,
    engine_for,
    latest_of,
    root_key_of,
)
from lazydp.kernels.noise_key import NoiseKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_FORMAT_VERSION = 1
_EXPORT = "export.json"

_log = logging.getLogger("lazydp.export")


def export(
    *,
    run: Path,
    dataset: Path,
    out: Path,
    name: str | None = None,
    ledger: str | None = None,
    audit: Path | None = None,
    allow_non_private: bool = False,
    sign_key: Path | None = None,
) -> BundleManifest:
    """Release the model of a finished run as the bundle `out`.

    Args:
        run: the run's folder, private.
        dataset: what it was trained on: feature spec, vocabularies and items go into the bundle.
        out: where the bundle goes; must not exist.
        name: of the model in the service; the feature spec's name where None.
        ledger: URL of the ledger in which the run was reserved; None for the default one.
        audit: report of an audit of this run's configuration, to be carried by its privacy statement.
        allow_non_private: release a run of mode `sgd` too, marked as not private.
        sign_key: file of the Ed25519 private key that signs the bundle (`bundle.signature`); None leaves it unsigned.

    Raises:
        InputError: the run is not finished, was exported already, or is of another dataset; or `out` exists; or the
            audit is of another run; or the signing key cannot be read.
        PrivacyError: the audit contradicts the run's claim, or the run is a trial of a sweep that did not keep it.
        NotPrivateError: the run has no privacy, and that was not allowed.
        PendingNoiseError: a row has pending noise after the flush.
        NonFiniteError: a weight is not finite.
        QualityError: the model does not reach the run's `minimum_quality`; nothing is released, and the run charged.
    """
    signer = None if sign_key is None else read_signing_key(sign_key)
    with RunFolder.locked(run) as folder:
        identity = _identity(folder, allow_non_private=allow_non_private)
        data = _dataset(dataset, identity)
        if not folder.key_destroyed():
            refuse_taken(out)
            audited = _audited(audit, identity)
            fenced = identity.config.private and identity.config.distributed is not None
            # From here on no attempt of the run on another host keeps a checkpoint.
            check_lease = take_lease(ledger, identity) if fenced else None
            flushed, commitment = _flush_and_prove(folder, identity, data)
            staged = out.absolute().with_name(f".{out.name}.{identity.run_id}")
            clear(staged)
            stands = standing(ledger, identity.run_id) if identity.config.private else UNREGISTERED
            if not _good_enough(flushed, identity, data):
                bound = contribution_bound(data)
                close_without_release(ledger, identity, max_examples_per_user=bound, key=commitment)
                write_json(run / _EXPORT, {"refused": True}, format_version=_FORMAT_VERSION, mode=PRIVATE_FILE)
                folder.destroy_keys()
                raise _refused(identity)
            _log.info("accounting, and writing the bundle")
            manifest = stage(staged, flushed, identity, data, name=name, stands=stands, audit=audited)
            if check_lease is not None:
                check_lease()
            if identity.config.private:
                bound = contribution_bound(data)
                commit(
                    ledger,
                    identity,
                    steps=manifest.step,
                    release=manifest.version,
                    max_examples_per_user=bound,
                    key=commitment,
                )
            write_json(run / _EXPORT, {"staged": str(staged)}, format_version=_FORMAT_VERSION, mode=PRIVATE_FILE)
        folder.destroy_keys()  # all of them, also where an export was killed among them
        return _publish(folder, out, identity, signer)


@dataclass(frozen=True, slots=True)
class Flushed:
    """A model in which no row has pending noise.

    Attributes:
        engine: holds it.
        steps: for each table the step that every row stands at.
        key: the run's noise key, under which the noise was drawn.
        realised_noise: how much of a step's noise arrives at the precision of these weights.
    """

    engine: Engine
    steps: dict[str, int]
    key: NoiseKey
    realised_noise: RealisedNoise | None = None


def _identity(folder: RunFolder, *, allow_non_private: bool) -> RunIdentity:
    identity = folder.identity()
    if identity is None:
        raise InputError(f"no run at {folder.path}: give the folder that `lazydp train --out` wrote")
    if not identity.config.private and not allow_non_private:
        raise NotPrivateError(
            f"run {identity.run_id} was trained without privacy (mode sgd): releasing it protects nobody; "
            "train with --mode lazydp, or say --allow-non-private"
        )
    if identity.tuning is not None and not identity.selected:
        raise PrivacyError(
            f"{folder.path} is one trial of sweep {identity.run_id}, and only the one that the sweep keeps may be "
            "released: finish it with `lazydp train --tune ... --resume`, then export its folder `best`"
        )
    return identity


def _dataset(path: Path, identity: RunIdentity) -> EncodedDataset:
    data = EncodedDataset.open(path)
    changed = identity.dataset_files and identity.dataset_files != data.files_digest()
    if changed or data.manifest.fingerprint != identity.dataset_fingerprint:
        raise InputError(
            f"dataset {path} has other content than the one that run {identity.run_id} was trained on: "
            "give the dataset it was trained on"
        )
    return data


def _finished(folder: RunFolder, identity: RunIdentity, data: EncodedDataset) -> Checkpoint:
    checkpoint = latest_of(folder, identity, data)
    if checkpoint is None or checkpoint.step < identity.config.steps:
        step = 0 if checkpoint is None else checkpoint.step
        raise InputError(
            f"run {identity.run_id} stands at step {step} of {identity.config.steps}: "
            "finish it with `lazydp train --resume` first"
        )
    return checkpoint


def refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} already exists: choose another output folder or remove it first")


def clear(staged: Path) -> None:
    """Remove what a killed process left of a staged bundle: the whole, or what was being written to become it."""
    for leftover in (staged, *staged.parent.glob(f".{glob.escape(staged.name)}.*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _flush_and_prove(folder: RunFolder, identity: RunIdentity, data: EncodedDataset) -> tuple[Flushed, str]:
    """The model of a finished run without pending noise, and the public commitment to the run's root key."""
    _log.info("reading the checkpoint of run %s", identity.run_id)
    checkpoint = _finished(folder, identity, data)
    root = root_key_of(checkpoint, folder, identity)
    key = identity.noise_key(root)
    # The tables are the checkpoint's own, mapped privately from its file: a second copy would double the memory.
    mapped = {name: table["weight"] for name, table in checkpoint.state["embeddings"]["tables"].items()}
    engine = engine_for(build_model(data.spec, identity.config.model), identity, key, tables=mapped)
    engine.load_state_dict(checkpoint.state)
    return flush_and_prove(engine, identity, key), root.commitment()


def flush_and_prove(engine: Engine, identity: RunIdentity, key: NoiseKey) -> Flushed:
    """Flush every row of `engine` in place, and let the exporter's own proof judge it.

    Raises:
        PendingNoiseError: a row has pending noise after the flush.
        NonFiniteError: the variance of the noise is not finite.
        PrivacyError: the weights are so large that float32 loses a step's noise.
    """
    tables = engine.state_dict()["embeddings"]["tables"]
    step = engine.steps_done
    pending = {name: PendingRows.of(table, step=step) for name, table in tables.items()}
    started = time.monotonic()
    engine.flush()
    rows = sum(table["last"].numel() for table in tables.values())
    _log.info("flushed %d rows of %d tables in %.1f s", rows, len(tables), time.monotonic() - started)
    if not identity.config.private:
        return Flushed(engine, dict.fromkeys(tables, step), key)
    steps = prove_flushed(
        engine.state_dict()["embeddings"]["tables"],
        pending,
        optimizer=embedding_optimizer(identity.config),
        noise_scale=engine.privacy.noise_scale("embeddings"),
        key=key.derive("noise"),
        step=step,
    )
    realised = None
    if engine.tables.rounding is not None:
        weights = {name: table["weight"] for name, table in tables.items()}
        realised = realised_noise(weights, rounding=engine.tables.rounding, key=key, step=step)
    return Flushed(engine, steps, key, realised)


def _audited(report: Path | None, identity: RunIdentity) -> AuditResult | None:
    if report is None:
        return None
    return AuditReport.load(report).statement(
        dataset=identity.dataset_fingerprint, config=identity.config.digest(), code_version=identity.code_version
    )


def _good_enough(flushed: Flushed, identity: RunIdentity, data: EncodedDataset) -> bool:
    """Whether the run's own check of quality, if it has one, lets the model go."""
    minimum = identity.config.minimum_quality
    if minimum is None:
        return True
    counts = noised_counts(data, identity.config, flushed.key, noise_multiplier=identity.noise_multiplier)
    assert counts is not None  # the configuration asks for them
    engine = flushed.engine
    return reaches(minimum, data, model=engine.model, tables=engine.table_weights(), counts=counts, key=flushed.key)


def _refused(identity: RunIdentity) -> QualityError:
    minimum = identity.config.minimum_quality
    assert minimum is not None
    return QualityError(
        f"run {identity.run_id} does not reach minimum_quality: its {minimum.metric} is below "
        f"{minimum.over_popularity:g} times that of the released counts, by a comparison with noise. Nothing is "
        "released, its noise key is destroyed, and its charge stays: the refusal itself is told of private data"
    )


def stage(
    staged: Path,
    flushed: Flushed,
    identity: RunIdentity,
    data: EncodedDataset,
    *,
    name: str | None,
    stands: Standing,
    audit: AuditResult | None,
) -> BundleManifest:
    """Write the bundle, synced, under a name where nobody looks for it, in a folder that others cannot enter."""
    engine = flushed.engine
    test_key = identity.config.private and flushed.key.is_test
    return write_bundle(
        staged,
        name=name or data.spec.name,
        mode=identity.config.mode,
        test_key=test_key,
        step=engine.steps_done,
        model=engine.model,
        table_weights=engine.table_weights(),
        flushed_steps=flushed.steps,
        spec=data.spec,
        vocabularies=data.vocabularies,
        statement=statement_of(
            identity,
            spec=data.spec,
            max_examples_per_user=contribution_bound(data),
            steps=engine.steps_done,
            test_key=test_key,
            spent_elsewhere=stands.spent_elsewhere,
            family=stands.family,
            audit=audit,
            realised_noise=flushed.realised_noise,
        ),
        lineage=Lineage(
            run_id=identity.run_id,
            dataset=stands.dataset,
            ledger_head=stands.head,
            config=identity.config.digest(),
            code_version=identity.code_version,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ),
        items=data.item_table,
        mode_of_folder=PRIVATE_DIRECTORY,
        popularity=noised_counts(data, identity.config, flushed.key, noise_multiplier=identity.noise_multiplier),
    )


def _publish(folder: RunFolder, out: Path, identity: RunIdentity, signer: Ed25519PrivateKey | None) -> BundleManifest:
    """Give the staged bundle its name: the last step, and the only one that makes anything visible."""
    document = read_json(folder.path / _EXPORT, format_version=_FORMAT_VERSION, what="export record")
    if document.get("refused"):
        raise _refused(identity)
    staged = Path(document["staged"])
    if staged.is_dir():
        if staged.parent != out.absolute().parent:
            raise InputError(
                f"the export of run {identity.run_id} was begun into {staged.parent}: name that folder again"
            )
        refuse_taken(out)
        if signer is not None:
            sign(staged, signer)
        staged.chmod(PUBLIC_DIRECTORY)
        staged.rename(out)
        sync_directory(staged.parent)
    elif not out.is_dir() or BundleManifest.load(out).lineage.run_id != identity.run_id:
        raise InputError(
            f"run {identity.run_id} was exported already, to a folder beside {staged}, and its noise key destroyed: "
            "copy that bundle, or train a new run"
        )
    manifest = BundleManifest.load(out)
    _log.info("bundle %s: %s version %s", out, manifest.name, manifest.version)
    return manifest
