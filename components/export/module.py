"""The way of a module of one's own from private to public: flush, prove, state, commit, publish, destroy the key.

**Reserved before or at the export.** `make_private_with_epsilon(dataset=...)` reserves what the training may spend
before its first step. A training that was not reserved may still be exported, if the budget admits it now. What a
budget bounds is what leaves the trust boundary, and until the export nothing did: the charge is composed with all
others whenever it is made, and is refused whole where it does not fit. What the reservation adds is foresight: nobody
trains what cannot be released, and trainings that were begun and given up are in the ledger. The statement therefore
says which of the two it was.

**All steps are charged.** A training that stopped early may have stopped because of what its losses showed. The whole
training covers every such choice; its first steps alone do not.

A failure before the commit leaves nothing; after the commit the same call finishes: the ledger knows the release.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lazydp.components.budget.accounting.epsilon import accountant_version, epsilon, epsilon_over_steps
from lazydp.components.budget.accounting.events import without_amplification
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.statement import (
    CHOICE_OF_SETTINGS,
    PRIVATE_METRICS,
    PrivacyStatement,
    RealisedNoise,
    StepEpsilon,
)
from lazydp.components.bundle.manifest import Lineage, Name
from lazydp.components.bundle.module_release import ModuleRelease, load_module_release, write_module_release
from lazydp.components.export.export import refuse_taken
from lazydp.components.export.proof import PendingRows, prove_flushed
from lazydp.components.export.realised import realised_noise
from lazydp.components.shared.errors import InputError, PrivacyError
from lazydp.components.shared.version import code_version
from lazydp.components.train.accounted_trainer import AccountedTrainer
from lazydp.components.train.charge import Claim, reserve
from lazydp.components.train.data.sampler import sampler_name
from lazydp.components.train.mechanism.parameters import GroupNorms
from lazydp.components.train.run.spending import Standing, standing

GUARANTEE = "differential privacy of everything in the release"
PUBLIC = (
    "sampling_prob, expected_batch_size, steps, max_grad_norm and every other setting of the training",
    "the module's architecture, and what it held before training: initial weights, buffers, frozen parameters",
    "how a record becomes an example: vocabularies, bounds and scaling of the dataset's code",
)
NOT_COVERED = (
    PRIVATE_METRICS,
    "dependence of one example's data on another's, such as inputs scaled by statistics of the data",
    "several examples of one person: epsilon is per example",
)
UNCHECKED = "losses that depend on other examples, and weights used past their layer: the checks were switched off"
RESERVED_LATE = "trainings on the same data of which nothing was released: this one was reserved when it was exported"


def export_module(
    trainer: AccountedTrainer,
    path: str | Path,
    *,
    name: str,
    ledger: str | None = None,
    dataset: str | None = None,
    run_id: str | None = None,
    by: str | None = None,
    assumed_public: Sequence[str] = (),
    not_covered: Sequence[str] = (),
) -> ModuleRelease:
    """Release the module that `trainer` trained, with its privacy statement. Afterwards the key is destroyed.

    Args:
        trainer: of `make_private_with_epsilon`.
        path: the folder that is made: `model.safetensors` and `manifest.json`.
        name: of the model, `[A-Za-z0-9._-]`.
        ledger: URL of the ledger, where the training was not reserved before; None for the default one.
        dataset: whose budget is charged, where the training was not reserved before.
        run_id: of the training in the ledger, where it was not reserved before; a new one where None.
        by: who releases; the operator by default.
        assumed_public: for the statement, what else must be public for the guarantee to hold.
        not_covered: for the statement, what else the guarantee does not cover.

    Returns:
        The release; `statement` says what privacy it spent.

    Raises:
        InputError: no step was done, `path` exists, or the dataset is missing or was given twice.
        BudgetExceededError: the training was not reserved, and the budget does not admit it.
        PrivacyError: the trainer was closed, or was bound to another key or ledger; the module holds something that was
            not trained privately.
        PendingNoiseError: a row has pending noise after the flush.
        NonFiniteError: a weight is not finite.
    """
    out = Path(path)
    _check(trainer, out, name)
    if trainer.claim is None and dataset is None:
        raise InputError(
            "a release is charged to a budget: say whose with dataset (a name or identifier of the ledger)"
        )
    if trainer.claim is not None and (ledger, dataset, run_id) != (None, None, None):
        raise InputError(
            f"training {trainer.claim.run_id} was reserved before its first step: leave out ledger, dataset and run_id"
        )
    flushed_steps, realised = _flush_and_prove(trainer)
    if trainer.claim is None:
        assert dataset is not None
        trainer.claim = reserve(
            ledger,
            dataset=dataset,
            run_id=run_id or f"run-{uuid.uuid4().hex[:16]}",
            mechanism=trainer.mechanism,
            commitment=trainer.key.commitment,
            by=by,
            late=True,
        )
    claim = trainer.claim
    with claim.open() as opened:
        stands = standing(claim.url, claim.run_id)
        write_module_release(
            out,
            name=name,
            test_key=trainer.key.key.is_test,
            step=trainer.steps_done,
            weights=trainer.model.state_dict(),
            flushed_steps=flushed_steps,
            statement=_statement(trainer, stands, realised, public=assumed_public, not_covered=not_covered),
            lineage=Lineage(
                run_id=claim.run_id,
                dataset=claim.dataset,
                ledger_head=stands.head,
                config=trainer.mechanism.digest(),
                code_version=code_version(),
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ),
            commit=lambda version: _commit(opened, trainer, claim, version, by=by),
        )
    trainer.close()
    return load_module_release(out, allow_test_key=True)


def _check(trainer: AccountedTrainer, out: Path, name: str) -> None:
    """What is wrong is said before anything is reserved."""
    trainer.refuse_closed()
    refuse_taken(out)
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise InputError(f"name must be letters, digits, '.', '_' and '-', 64 at most; found {name!r}") from None
    if not trainer.steps_done:
        raise InputError("no step was done: there is nothing to release")
    if trainer.trainer.allow_moving_buffers:
        raise PrivacyError(
            "the training allowed buffers that the forward pass changes (allow_moving_buffers): they hold raw "
            "examples, and no epsilon covers them; train without them (LayerNorm or GroupNorm instead of BatchNorm)"
        )
    trainer.refuse_changed()


def _flush_and_prove(trainer: AccountedTrainer) -> tuple[dict[str, int], RealisedNoise | None]:
    """Flush every row, and let the exporter's own proof judge it."""
    private, step = trainer.trainer, trainer.steps_done
    scale = trainer.mechanism.privacy.noise_scale("embeddings")

    def tables() -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = private.tables.state_dict()["tables"]
        return found

    pending = {table: PendingRows.of(rows, step=step) for table, rows in tables().items()}
    trainer.flush()
    private.dense.check_finite()
    weights = private.tables.weights()
    steps = prove_flushed(
        tables(), pending, optimizer=private.embeddings, noise_scale=scale, key=private.noise_key, step=step
    )
    if private.tables.rounding is None:
        return steps, None
    return steps, realised_noise(weights, rounding=private.tables.rounding, key=trainer.key.key, step=step)


def _commit(ledger: Ledger, trainer: AccountedTrainer, claim: Claim, version: str, *, by: str | None) -> None:
    event = trainer.mechanism.event()
    ledger.commit(claim.run_id, event=event, release=version, key=trainer.key.commitment, by=by)


def _statement(
    trainer: AccountedTrainer,
    stands: Standing,
    realised: RealisedNoise | None,
    *,
    public: Sequence[str],
    not_covered: Sequence[str],
) -> PrivacyStatement:
    mechanism, test_key = trainer.mechanism, trainer.key.key.is_test
    privacy, delta = mechanism.privacy, mechanism.target_delta
    event = mechanism.event()
    known_batches = without_amplification(noise_multiplier=privacy.noise_multiplier, steps=mechanism.steps)
    curve = [] if test_key else epsilon_over_steps(mechanism.event, steps=mechanism.steps, delta=delta)
    norms = privacy.max_grad_norm
    assert trainer.claim is not None
    return PrivacyStatement(
        private=not test_key,
        why_not_private="trained under a noise key made for tests, which everyone knows" if test_key else None,
        epsilon=None if test_key else epsilon(event, delta=delta),
        delta=delta,
        accountant="pld",
        accountant_version=accountant_version(),
        epsilon_rdp=None if test_key else epsilon(event, delta=delta, accountant="rdp"),
        privacy_unit="example",
        sampler=sampler_name("example"),
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=asdict(norms) if isinstance(norms, GroupNorms) else norms,
        expected_batch_size=privacy.expected_batch_size,
        sampling_prob=mechanism.sampling_prob,
        steps=mechanism.steps,
        epsilon_without_amplification=None if test_key else epsilon(known_batches, delta=delta),
        epsilon_user_level=None,
        epsilon_over_steps=tuple(StepEpsilon(step=step, epsilon=value) for step, value in curve),
        guarantee=GUARANTEE,
        family=stands.family,
        assumed_public=(*PUBLIC, *public),
        not_covered=(
            *NOT_COVERED,
            CHOICE_OF_SETTINGS,
            *((UNCHECKED,) if trainer.trainer.allow_unrepeatable_losses else ()),
            *((RESERVED_LATE,) if trainer.claim.late else ()),
            *not_covered,
        ),
        spent_elsewhere=stands.spent_elsewhere,
        test_key=test_key,
        code_version=code_version(),
        realised_noise=realised,
    )
