"""A recommendation query, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lazydp.components.bundle.topk import Scores

Scalar: TypeAlias = str | int | float | bool | None
Known: TypeAlias = Literal["yes", "no", "cannot tell"]
# `Query` and `Ranking` are not changed once made. They are not frozen, since Python sets each field of a frozen class
# by a call: for a query these calls took as long as its scores.
Source: TypeAlias = Literal["user", "history", "user+history", "features", "item", "popular", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What an item must have in one metadata column: everything that is named here.

    Attributes:
        any_of: one of these values; None for any.
        gte: a number of at least this.
        gt: a number above this. One number of the item must lie within all four bounds.
        lte: a number of at most this.
        lt: a number below this.
        without: a condition that the item must not meet; an item without a value meets none.
    """

    any_of: Sequence[str] | None = None
    gte: float | None = None
    gt: float | None = None
    lte: float | None = None
    lt: float | None = None
    without: Condition | None = None

    @property
    def is_range(self) -> bool:
        """Whether there is a bound on the item's number."""
        return not (self.gte is None and self.gt is None and self.lte is None and self.lt is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Boost:
    """A change of the scores of some items, before they are ordered.

    Attributes:
        attribute: metadata column.
        matching: which items; None for those with a number there, whose number scales `amount`.
        multiply: whether a positive score is multiplied by the amount, and a negative one divided by it, so that an
            amount above 1 raises every score. Otherwise the amount is added.
        amount: finite; above 0 where it multiplies.
    """

    attribute: str
    matching: Condition | None
    multiply: bool
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place in a ranking: behind the item `code`, which had the score `score` (a float32)."""

    score: float
    code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryCap:
    """At most `limit` items of each value of the metadata column `attribute`."""

    attribute: str
    limit: int


@dataclass(slots=True, kw_only=True)
class Query:
    """What somebody asks for. Ids are text.

    Attributes:
        user_id: a user of the model's vocabulary.
        history: items the person took, oldest first; the model reads the latest of them.
        history_weights: for each item of `history` how much it counts, above 0; None for all alike. Relative.
        half_life: so many items back, an item of `history` counts half; None for no decay beside the model's own.
        similar_to: items to answer with the like of, instead of asking for a person.
        similar_weights: for each of them how much it counts, above 0; None for all alike. Relative.
        features: values of user and context features by name.
        k: items wanted.
        offset: items to skip: the first of a further page.
        exclude: items never to answer with.
        exclude_seen: whether the items of `history` are excluded too.
        candidates: the only items to choose from; None for the whole catalogue.
        filters: metadata column -> condition that an item must meet.
        boosts: changes of scores, applied in this order.
        cap: bound on items of one category.
        after: where the page begins, before `offset`; None for the best item.
        alone: whether scores must not depend, to the last bit, on the queries that are ranked together with this one.
        explain: whether to say which items of the history lie nearest to each answer.
    """

    user_id: str | None = None
    history: Sequence[str] = ()
    history_weights: Sequence[float] | None = None
    half_life: float | None = None
    similar_to: Sequence[str] = ()
    similar_weights: Sequence[float] | None = None
    features: Mapping[str, Scalar | Sequence[Scalar]] = field(default_factory=dict)
    k: int = 10
    offset: int = 0
    exclude: Sequence[str] = ()
    exclude_seen: bool = True
    candidates: Sequence[str] | None = None
    filters: Mapping[str, Condition] = field(default_factory=dict)
    boosts: Sequence[Boost] = ()
    cap: CategoryCap | None = None
    after: Position | None = None
    alone: bool = False
    explain: bool = False


@dataclass(slots=True, kw_only=True)
class Ranking:
    """The best items, best first.

    Attributes:
        codes: item codes.
        scores: float32 [n] by the same index; comparable within one ranking only.
        source: what the ranking rests on; `popular` is the fall-back for somebody the model knows nothing of, `none`
            says that there is no answer, and `notice` why.
        more: whether further items would follow on the next page.
        unknown_items: ids of history, candidates and `similar_to` that the model does not know; they were ignored.
        reasons: for each item the codes of the nearest items of the history; empty unless asked for.
        notice: one line for a person where something was left out.
        approximate: whether items were found by an approximate index.
        user_known: whether the model was trained with the user who is named; None where none is, or where the model
            reads no users. Of a hashed user nobody can tell: see `QueryEncoder.knows`.
    """

    codes: list[int]
    scores: Scores
    source: Source
    more: bool = False
    unknown_items: Sequence[str] = ()
    reasons: Sequence[Sequence[int]] = ()
    notice: str | None = None
    approximate: bool = False
    user_known: Known | None = None
