"""What a model cost in privacy, in sentences for a person."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from lazydp.components.budget.ledger.state import Release
from lazydp.components.budget.report.overview import Timeline
from lazydp.components.budget.statement import PrivacyStatement

# Above this the bound on a guess rounds to certainty.
_CERTAIN = 0.9999
_DIGITS = 4
PER = {"user": "person", "example": "interaction"}


@dataclass(frozen=True, slots=True)
class Figure:
    """One epsilon of the headline.

    Attributes:
        per: whom it protects: `person`, or one `interaction` (an example).
        epsilon: None where none is known.
        sentence: what it means, or why there is none.
    """

    per: str
    epsilon: float | None
    sentence: str


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a reader is told of one served model.

    Attributes:
        name: of the model.
        about: kind, size and version, in short parts.
        statement: of its bundle.
        figures: the headline, per person first; empty where no privacy is claimed.
        warnings: what a reader must not miss.
        timeline: of the budget of the model's own dataset; None where the ledger does not say.
        notice: why there is none, or why its figures are not to be trusted.
    """

    name: str
    about: tuple[str, ...]
    statement: PrivacyStatement
    figures: tuple[Figure, ...]
    warnings: tuple[str, ...]
    timeline: Timeline | None
    notice: str | None

    @property
    def last_release(self) -> Release | None:
        """The latest on its dataset; None where the ledger has none."""
        return self.timeline.releases[0] if self.timeline is not None and self.timeline.releases else None


def model_card(
    name: str,
    about: tuple[str, ...],
    statement: PrivacyStatement,
    *,
    timeline: Timeline | None,
    notice: str | None,
    warn_above: float,
) -> ModelCard:
    """The card of a model; arguments as its attributes, and the epsilon per person above which it warns."""
    found = figures(statement)
    return ModelCard(name, about, statement, found, _warnings(statement, found, warn_above), timeline, notice)


def figures(statement: PrivacyStatement) -> tuple[Figure, ...]:
    """Every epsilon that the statement claims, per person first."""
    if not statement.private or statement.epsilon is None:
        return ()
    if statement.privacy_unit == "user":
        return (Figure("person", statement.epsilon, meaning(statement.epsilon, statement.delta, "person")),)
    person = statement.epsilon_user_level
    sentence = (
        "No figure per person is known: the number of interactions of one person is not bounded."
        if person is None
        else meaning(person, statement.delta, "person")
    )
    return (
        Figure("person", person, sentence),
        Figure("interaction", statement.epsilon, meaning(statement.epsilon, statement.delta, "interaction")),
    )


def meaning(epsilon: float, delta: float, per: str, *, seen: str = "this model") -> str:
    """The bound on a guess at even odds, after seeing `seen`: posterior odds are at most exp(epsilon) times prior odds.

    Source: Dwork and Roth, The Algorithmic Foundations of Differential Privacy (2014), section 2.3.
    """
    what = {"person": "the data of a certain person", "interaction": "one certain interaction"}[per]
    sure = 1.0 / (1.0 + math.exp(-epsilon))
    start = f"Somebody who thinks it an even chance that {what} was used, and then sees {seen},"
    if sure >= _CERTAIN:
        return f"{start} may become practically certain of it."
    exception = f"(except with the chance delta, {at_most(delta)})"
    return f"{start} can become at most {at_most(100 * sure)} % sure of it {exception}."


def audit_words(statement: PrivacyStatement) -> str:
    """What the audit showed, and whether the claim stands beside it."""
    audit = statement.audit
    if audit is None:
        return "no audit was made of this model"
    shown = (
        f"an attack made for the purpose showed at least this epsilon per {PER[statement.privacy_unit]}, "
        f"with {100 * audit.confidence:g} % confidence"
    )
    if statement.epsilon is None:
        return f"{shown}; no epsilon is claimed"
    claimed = at_most(statement.epsilon)
    if _contradicted(statement):
        return f"{shown}: more than the {claimed} claimed, so the audit contradicts the claim"
    return f"{shown}; the claim, {claimed}, is an upper bound, so the audit does not contradict it"


def _contradicted(statement: PrivacyStatement) -> bool:
    audit, claimed = statement.audit, statement.epsilon
    return audit is not None and claimed is not None and audit.epsilon_lower_bound > claimed


def at_most(value: float) -> str:
    """An upper bound in four digits, rounded up."""
    return _rounded(value, ROUND_CEILING)


def at_least(value: float) -> str:
    """A lower bound in four digits, rounded down."""
    return _rounded(value, ROUND_FLOOR)


def _rounded(value: float, rounding: str) -> str:
    if not math.isfinite(value):
        return "without bound"
    exact = Decimal(repr(float(value)))
    if not exact:
        return "0"
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - _DIGITS + 1), rounding=rounding)
    return f"{rounded.normalize():,f}"


def _warnings(statement: PrivacyStatement, found: tuple[Figure, ...], limit: float) -> tuple[str, ...]:
    contradicted = ("An audit showed more than is claimed: do not rely on the claim.",)
    return _warnings_of_figures(statement, found, limit) + (contradicted if _contradicted(statement) else ())


def _warnings_of_figures(statement: PrivacyStatement, found: tuple[Figure, ...], limit: float) -> tuple[str, ...]:
    if not found:
        return (f"Not private: {statement.why_not_private or 'no privacy is claimed'}.",)
    person = found[0].epsilon
    if person is None:
        return ("Nothing is known of the protection of a person, only of a single interaction.",)
    if person > limit:
        others = (
            " The figure per interaction bounds what one interaction reveals, not all of a person."
            if len(found) > 1
            else ""
        )
        return (
            f"Epsilon per person is {at_most(person)}, above {limit:g}, the limit in this service's settings "
            f"(epsilon_warning).{others}",
        )
    return ()
