"""What a run asks of the ledger: room before the first step, and the charge before the release.

The event that is charged is worked out from the configuration, before there is a dataset to sample; `check_event` holds
what it says of training against the sampler that draws the batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from lazydp.components.budget.accounting.events import event_to_json
from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.views import Reservation
from lazydp.components.budget.statement import FAMILY_DECLARATION, Family, SpentElsewhere
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import PrivacyError
from lazydp.components.train.data.sampler import PoissonSampler
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.identity import RunIdentity


def check_event(sampler: PoissonSampler, identity: RunIdentity, *, max_examples_per_user: int | None) -> None:
    """Refuse to train on batches of another distribution than the one that is charged; to be called before either.

    Args:
        sampler: draws the batches of the run.
        identity: of the run.
        max_examples_per_user: the contribution bound k; None where there is none.

    Raises:
        PrivacyError: the sampler's own event is not that of the run's training.
    """
    config = identity.config
    drawn = sampler.dp_event(
        noise_multiplier=identity.noise_multiplier or 0.0,
        steps=config.steps,
        max_examples_per_user=max_examples_per_user if config.privacy_unit == "user" else None,
    )
    charged = RunCost.of(identity, max_examples_per_user).of_training()
    if drawn != charged:
        found, expected = (json.dumps(event_to_json(event)) for event in (drawn, charged))
        raise PrivacyError(
            f"run {identity.run_id} would be charged for {expected}, and its sampler draws batches for {found}: "
            "nothing is trained; this is a mistake in the code that draws the batches, not in the configuration"
        )


def reserve(
    url: str | None,
    identity: RunIdentity,
    data: EncodedDataset,
    *,
    key: str = "",
    first_budget: tuple[float, float] | None = None,
    other_people: str = "",
    by: str | None = None,
) -> Reservation:
    """Claim what the whole run may spend; a run that holds its claim already (a retry, a resumed run) keeps it.

    A trial of a sweep claims what the whole sweep may spend: all its trials are that one mechanism.

    Args:
        url: of the ledger; None for the default one.
        identity: of the run.
        data: what it is trained on; it is registered in the ledger.
        key: public commitment to the run's root key, which the reservation is bound to; the pipeline's gate, which has
            no key yet, gives none.
        first_budget: (epsilon, delta) for a family that never had a budget; one that has is left as it is.
        other_people: why these people have no budget yet, where they look like others that have one; for the ledger.
        by: who asks; the operator by default.

    Raises:
        BudgetExceededError: the dataset's budget does not admit the run.
        PrivacyError: the dataset has no budget, or one of another privacy unit, or the run was closed, or is bound to
            another key.
        UnavailableError: the ledger does not answer.
    """
    event = RunCost.of(identity, data.manifest.max_examples_per_user).of_release()
    with Ledger.open(url) as ledger:
        _check_ledger(ledger, identity)
        dataset = register(
            ledger,
            fingerprint=identity.dataset_fingerprint,
            name=data.spec.name,
            sources=[data.manifest.source.digest],
            family=data.spec.family or "",
            default_family=data.manifest.family or "",
            user_column=data.spec.user.column if data.spec.user is not None else "",
            places=data.manifest.source.locations,
            by=by,
        ).identifier
        if first_budget is not None and ledger.show(dataset).epsilon is None:
            epsilon, delta = first_budget
            ledger.set_budget(
                dataset,
                epsilon=epsilon,
                delta=delta,
                privacy_unit=identity.config.privacy_unit,
                by=by,
                reason="first budget",
                other_people=other_people,
            )
        reservation = ledger.reserve(
            dataset=dataset,
            event=event,
            run_id=identity.run_id,
            privacy_unit=identity.config.privacy_unit,
            purpose="training" if identity.tuning is None else "tuning",
            # One for the whole sweep: which settings a trial drew is told of the best one alone.
            config_digest=identity.config.digest() if identity.tuning is None else identity.tuning.digest,
            code_version=identity.code_version,
            key=key,
            data=ledger.secret().identifier("files", data.files_digest()),
            by=by,
        )
        if key:
            ledger.require_reservation(identity.run_id, dataset=dataset, event=event, key=key)
        return reservation


def take_lease(url: str | None, identity: RunIdentity) -> Callable[[], None]:
    """End all earlier attempts of a run that holds its reservation; returns what refuses once this one is ended, too.

    A run that was committed has its last attempt: an export that was killed after its commit goes on under it.

    Raises:
        PrivacyError: the run holds no reservation.
    """
    with Ledger.open(url) as ledger:
        run = ledger.state().runs.get(identity.run_id)
        closed = run is not None and run.status == "committed"
        generation = run.generation if run is not None and closed else ledger.take_lease(identity.run_id)

    def check() -> None:
        with Ledger.open(url, read_only=True) as ledger:
            ledger.check_lease(identity.run_id, generation)

    return check


def ledger_of(url: str | None) -> str:
    """Which ledger lies at a URL, None for the default one."""
    with Ledger.open(url, read_only=True) as ledger:
        return ledger.name()


def _check_ledger(ledger: Ledger, identity: RunIdentity) -> None:
    """A run stays with the ledger that promised it its budget: elsewhere, nobody knows what it was charged."""
    if identity.ledger and identity.ledger != ledger.name():
        raise PrivacyError(
            f"run {identity.run_id} was reserved in another ledger (whose first entry is {identity.ledger[:12]}) than "
            f"{ledger.url}: it can neither go on nor be released against this one; name the one that it began with"
        )


def commit(
    url: str | None,
    identity: RunIdentity,
    *,
    steps: int,
    release: str,
    max_examples_per_user: int | None,
    key: str,
    final: bool = True,
) -> None:
    """Charge what the run spent; to be called before the release can be seen. Repeated, it changes nothing.

    Args:
        url: of the ledger that holds the reservation.
        identity: of the run.
        steps: steps done.
        release: version of the bundle.
        max_examples_per_user: the contribution bound k.
        key: public commitment to the run's root key.
        final: false for a snapshot of a run that goes on: what the whole run reserved stays charged.

    Raises:
        PrivacyError: the run holds no reservation there, or one for another key.
    """
    event = RunCost.of(identity, max_examples_per_user).of_release(steps=steps)
    with Ledger.open(url) as ledger:
        _check_ledger(ledger, identity)
        ledger.commit(
            identity.run_id, event=event, release=release, step=None if final else steps, final=final, key=key
        )


def close_without_release(
    url: str | None, identity: RunIdentity, *, max_examples_per_user: int | None, key: str
) -> None:
    """Charge a sweep that came to nothing: another one is another mechanism, so this one's charge stays."""
    steps = identity.config.steps
    commit(url, identity, steps=steps, release="nothing", max_examples_per_user=max_examples_per_user, key=key)


@dataclass(frozen=True, slots=True)
class Standing:
    """What the ledger says of a run that is about to be released.

    Attributes:
        dataset: the identifier under which the ledger publishes the run's dataset.
        spent_elsewhere: what else was released from the dataset, or from one that shares users with it.
        family: that the dataset declared; None where it declared none.
        head: `number:digest` of the ledger's last entry.
    """

    dataset: str
    spent_elsewhere: tuple[SpentElsewhere, ...]
    family: Family | None = None
    head: str = ""


UNREGISTERED = Standing("unregistered", ())
"""Of a run that no ledger knows: one without privacy."""


def standing(url: str | None, run_id: str) -> Standing:
    """How the run stands in the ledger; of a run that holds no reservation there, the commit will say so."""
    with Ledger.open(url, read_only=True) as ledger:
        state, head = ledger.state(), ledger.head()
    own = state.runs.get(run_id)
    if own is None:
        return UNREGISTERED
    family = state.datasets[own.dataset].family
    budget = state.budget(own.dataset)
    words = budget.other_people if budget is not None else ""
    others = (run for run in state.runs_of(state.family(own.dataset)) if run.run_id != run_id)
    return Standing(
        own.dataset,
        tuple(
            SpentElsewhere(purpose=run.purpose, run_id=run.run_id, epsilon=run.releases[-1].epsilon)
            for run in others
            if run.releases and run.releases[-1].epsilon is not None
        ),
        Family(name=family, declaration=FAMILY_DECLARATION, other_people=words) if family else None,
        head,
    )
