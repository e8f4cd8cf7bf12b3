"""The budget gate of a pipeline: no training without a reservation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.views import Reservation

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


def reserve_for_training(
    *,
    ledger_url: str | None,
    dataset_fingerprint: str,
    dataset_name: str,
    event: DpEvent,
    run_id: str,
    privacy_unit: str,
    config_digest: str,
    parents: Iterable[str] = (),
    sources: Iterable[str] = (),
    first_budget: tuple[float, float] | None = None,
    by: str | None = None,
) -> Reservation:
    """Register the dataset, and reserve what the run may at most spend.

    Args:
        ledger_url: of the ledger; None for the default one.
        dataset_fingerprint: of the encoded dataset, private.
        dataset_name: for people.
        event: the whole run, per `privacy_unit`.
        run_id: names the run for good; a retry with the same one gets the same reservation.
        privacy_unit: `example` or `user`.
        config_digest: of the run's configuration.
        parents: datasets that share users with this one.
        sources: digests of the data it was made from, private.
        first_budget: (epsilon, delta) for a dataset that never had a budget; one that has is left as it is.
        by: who asks.

    Raises:
        BudgetExceededError: the budget does not admit the run.
        PrivacyError: the dataset has no budget, or one of another privacy unit.
        UnavailableError: the ledger does not answer.
    """
    with Ledger.open(ledger_url) as ledger:
        dataset = register(
            ledger, fingerprint=dataset_fingerprint, name=dataset_name, parents=parents, sources=sources, by=by
        ).identifier
        if first_budget is not None and ledger.show(dataset).epsilon is None:
            epsilon, delta = first_budget
            ledger.set_budget(
                dataset,
                epsilon=epsilon,
                delta=delta,
                privacy_unit=privacy_unit,
                by=by,
                reason="first budget",
            )
        return ledger.reserve(
            dataset=dataset,
            event=event,
            run_id=run_id,
            privacy_unit=privacy_unit,
            config_digest=config_digest,
            by=by,
        )
