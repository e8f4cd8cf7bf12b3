"""What a served model cost in privacy, in sentences for a person."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.service.routes.plot import BudgetBars, budget_bars
from lazydp.service.schemas import ModelStatement

# Above this the bound on a guess rounds to certainty.
_CERTAIN = 0.9999


@dataclass(frozen=True, slots=True)
class Figure:
    """One epsilon of the headline.

    Attributes:
        per: whom it protects: `person` or `example`.
        epsilon: None where none is known.
        sentence: what it means, or why there is none.
    """

    per: str
    epsilon: float | None
    sentence: str


@dataclass(frozen=True, slots=True)
class PrivacyView:
    """Everything that the page says of one model's privacy.

    Attributes:
        model: name, version, dataset and statement.
        figures: the headline, per person first; empty where no privacy is claimed.
        warnings: what a reader must not miss.
        budget: of the model's own dataset; None where the ledger does not say.
        notice: why there is no budget.
        relatives: identifiers of other datasets of the same data, whose runs count in the budget.
    """

    model: ModelStatement
    figures: tuple[Figure, ...]
    warnings: tuple[str, ...]
    budget: BudgetBars | None
    notice: str | None
    relatives: tuple[str, ...]


def privacy_view(model: ModelStatement, *, warn_above: float) -> PrivacyView:
    """The view of one model.

    Args:
        model: as GET /v1/privacy/budget has it.
        warn_above: epsilon per person from which a warning is shown.
    """
    statement = model.statement
    figures = _figures(statement)
    return PrivacyView(
        model=model,
        figures=figures,
        warnings=_warnings(statement, figures, warn_above),
        budget=None if model.budget is None else budget_bars(model.budget),
        notice=model.notice,
        relatives=() if model.budget is None else tuple(model.budget.family),
    )


def _figures(statement: PrivacyStatement) -> tuple[Figure, ...]:
    if not statement.private or statement.epsilon is None:
        return ()
    if statement.privacy_unit == "user":
        return (
            Figure("person", statement.epsilon, _meaning(statement.epsilon, statement.delta, "a given person's data")),
        )
    person = statement.epsilon_user_level
    sentence = (
        "No figure per person is known: the number of examples of one person is not bounded."
        if person is None
        else _meaning(person, statement.delta, "a given person's data")
    )
    return (
        Figure("person", person, sentence),
        Figure("example", statement.epsilon, _meaning(statement.epsilon, statement.delta, "one given interaction")),
    )


def _meaning(epsilon: float, delta: float, what: str) -> str:
    """The bound on a guess at even odds: posterior odds are at most exp(epsilon) times prior odds.

    Source: Dwork and Roth, The Algorithmic Foundations of Differential Privacy (2014), section 2.3.
    """
    sure = 1.0 / (1.0 + math.exp(-epsilon))
    start = f"Whoever sees the model, and before that thought it an even chance that {what} were used"
    if sure >= _CERTAIN:
        return f"{start}, may become practically certain: this figure alone rules out very little."
    return f"{start}, can become at most {100 * sure:.4g} % sure of it (but for a chance of {delta:g})."


def _warnings(statement: PrivacyStatement, figures: tuple[Figure, ...], limit: float) -> tuple[str, ...]:
    if not figures:
        return (f"Not private: {statement.why_not_private or 'no privacy is claimed'}.",)
    person = figures[0].epsilon
    if person is None:
        return ("Nothing is known of the protection of a person, only of a single interaction.",)
    if person > limit:
        return (
            f"Epsilon per person, {person:.4g}, is above {limit:g}, the limit in this service's settings "
            "(epsilon_warning). Read the figure per person, not the one per interaction, as what people are promised.",
        )
    return ()
