"""A recommendation query, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lazydp.components.bundle.topk import Scores

Scalar: TypeAlias = str | int | float | bool | None
Source: TypeAlias = Literal["user", "history", "user+history", "features", "item", "popular", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryCap:
    """At most `limit` items of each value of the metadata column `attribute`."""

    attribute: str
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What somebody asks for. Ids are text.

    Attributes:
        user_id: a user of the model's vocabulary.
        history: items the person took, oldest first; the model reads the latest of them.
        features: values of user and context features by name.
        k: items wanted.
        offset: items to skip: the first of a further page.
        exclude: items never to answer with.
        exclude_seen: whether the items of `history` are excluded too.
        candidates: the only items to choose from; None for the whole catalogue.
        filters: metadata column -> values; an item must have one of the values of every column named.
        cap: bound on items of one category.
        explain: whether to say which items of the history lie nearest to each answer.
    """

    user_id: str | None = None
    history: Sequence[str] = ()
    features: Mapping[str, Scalar | Sequence[Scalar]] = field(default_factory=dict)
    k: int = 10
    offset: int = 0
    exclude: Sequence[str] = ()
    exclude_seen: bool = True
    candidates: Sequence[str] | None = None
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    cap: CategoryCap | None = None
    explain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The best items, best first.

    Attributes:
        codes: item codes.
        scores: float32 [n] by the same index; comparable within one ranking only.
        source: what the ranking rests on; `popular` is the fall-back for somebody the model knows nothing of, `none`
            says that there is no answer, and `notice` why.
        more: whether further items would follow on the next page.
        unknown_items: ids of history and candidates that the model does not know; they were ignored.
        reasons: for each item the codes of the nearest items of the history; empty unless asked for.
        notice: one line for a person where something was left out.
    """

    codes: list[int]
    scores: Scores
    source: Source
    more: bool = False
    unknown_items: Sequence[str] = ()
    reasons: Sequence[Sequence[int]] = ()
    notice: str | None = None
