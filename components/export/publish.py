"""Snapshots: the model as it stands, released while training goes on.

    FOLDER/step-000000500/   a bundle each, whole or absent
    FOLDER/current           a link to the latest, moved atomically: what `lazydp serve` watches

**Why intermediate models are covered.** The mechanism that is accounted for after s steps is the sequence of the s
noised gradient sums, each free to depend on those before: DP-SGD's analysis grants the adversary every one of them. A
model with no pending noise at step s is computed from the first s of them and from nothing else of the data, as is
every later model from its own. So all snapshots of a run and its final model are together post-processing of one
mechanism, whose cost is that of the steps of the latest one released: the ledger charges the run once, at the latest.

**Why the flush keeps lazy equal to eager, jointly.** A flush at step s gives every row the sum of the noises of the
steps that it missed up to s, and what it gets later is the sum of later steps' noises: sums over disjoint steps are
independent, in eager training too. The joint distribution of (snapshots, final model) is that of eager training.

**Why no noise is used twice.** The address of a row's noise is (table, row, step caught up to). A flush at s moves
`last` to s for every row, so a later catch-up has another step in its address. But the same run without its flush, or
with another one, would draw for other intervals under the same key: two releases from two such histories could hold two
independent noises on one sum, to be averaged. Hence `publish_every` belongs to what a run is, like its learning rate: a
resumed run may not change it, and repeats the steps after its checkpoint to the same bits, flushes included.

**Counts of items** that the run releases (`train.popularity`) are the same bits in every snapshot and in the export:
one release, which the event holds once, at whatever step.

A kill at any moment: before the checkpoint, nothing was released, and the resumed run comes to the same flush; after
it, the resumed run stands at the snapshot and finishes its release before the next step. A bundle has its name only
after its commit, and `current` names only what has its name.

The noise key goes on living in the run's private folder, for there is noise left to draw. It is destroyed by `export`;
if the run is given up, destroy the folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.bundle.signature import read_signing_key, sign
from lazydp.components.export.export import clear, flush_and_prove, stage
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PUBLIC_DIRECTORY, sync_directory
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.settings_check import contribution_bound
from lazydp.components.train.run.spending import commit, standing
from lazydp.kernels.noise_key import NoiseKey

POINTER = "current"

_log = logging.getLogger("lazydp.publish")


@dataclass(frozen=True, slots=True)
class Snapshots:
    """Where a run's snapshots go.

    Attributes:
        folder: of the bundles and the link; made where there is none.
        ledger: URL of the ledger that holds the run's reservation; None for the default one.
        name: of the model in the service; the feature spec's name where None.
        sign_key: file of the Ed25519 private key that signs them; None leaves them unsigned.
    """

    folder: Path
    ledger: str | None = None
    name: str | None = None
    sign_key: Path | None = None

    def __post_init__(self) -> None:
        """Refuse a signing key that cannot be read before the run reserves anything."""
        if self.sign_key is not None:
            read_signing_key(self.sign_key)

    def release(
        self, engine: Engine, identity: RunIdentity, key: NoiseKey, data: EncodedDataset, *, keep: Callable[[], None]
    ) -> None:
        """Flush `engine` in place and release it as it stands. Repeated at the same step, it finishes what was begun.

        Args:
            engine: of the run, at the step of the snapshot.
            identity: of the run.
            key: the run's noise key.
            data: what it is trained on.
            keep: writes the run's checkpoint: called when the rows are flushed, before anything is released.

        Raises:
            InputError: the folder holds a snapshot of another run, or the signing key cannot be read.
            PendingNoiseError: a row has pending noise after the flush.
            NonFiniteError: a weight is not finite.
        """
        signer = None if self.sign_key is None else read_signing_key(self.sign_key)
        flushed = flush_and_prove(engine, identity, key)
        keep()
        step = engine.steps_done
        bundle = self.folder.absolute() / f"step-{step:09d}"

        def charge(release: str) -> None:
            commit(
                self.ledger,
                identity,
                steps=step,
                release=release,
                max_examples_per_user=contribution_bound(data),
                key=key.commitment(),
                final=False,
            )

        if bundle.is_dir():
            charge(_own(bundle, identity).version)  # in the ledger already, if it is this run's
        else:
            staged = bundle.with_name(f".{bundle.name}")
            clear(staged)
            stands = standing(self.ledger, identity.run_id)
            manifest = stage(staged, flushed, identity, data, name=self.name, stands=stands, audit=None)
            charge(manifest.version)
            if signer is not None:
                sign(staged, signer)
            staged.chmod(PUBLIC_DIRECTORY)
            staged.rename(bundle)
            sync_directory(bundle.parent)
            _log.info("snapshot of step %d: %s version %s", step, bundle, manifest.version)
        point(self.folder / POINTER, bundle)


def point(link: Path, bundle: Path) -> None:
    """Make `link` a link to `bundle` in one rename: whoever reads it finds the old one or the new one.

    Raises:
        InputError: something that is no link stands there.
    """
    if link.exists() and not link.is_symlink():
        raise InputError(f"{link} is no link: it cannot be made to point at {bundle.name}; remove it first")
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(bundle, link.absolute().parent))
    fresh.replace(link)
    sync_directory(link.parent)


def _own(bundle: Path, identity: RunIdentity) -> BundleManifest:
    manifest = BundleManifest.load(bundle)
    found = manifest.lineage.run_id
    if found != identity.run_id:
        raise InputError(
            f"{bundle} is a snapshot of run {found}, this is run {identity.run_id}: publish it into another folder"
        )
    return manifest
