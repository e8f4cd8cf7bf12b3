"""What a query changes in the scores of items: boosts, what is left out, and where its page begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lazydp.components.bundle.attributes import Mask, Numbers
from lazydp.components.bundle.encoder import QueryEncoder
from lazydp.components.bundle.items import ItemTable
from lazydp.components.bundle.query import Boost, Position, Query
from lazydp.components.bundle.topk import Codes, Scores

EXCLUDED = np.float32(-np.inf)
# Boosted scores stay finite: minus infinity is for what is excluded.
_LIMIT = float(np.finfo(np.float32).max)
# The whole catalogue, or the items by their codes.
_Part: TypeAlias = slice | Codes
WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Selection:
    """Changes scores as a query asks, for one catalogue."""

    items: ItemTable
    encoder: QueryEncoder

    def apply(self, query: Query, scores: Scores, codes: _Part = WHOLE) -> None:
        """Boost `scores` and set those of what is left out to minus infinity.

        Args:
            query: what is asked for.
            scores: float32, by item code, or by the index of `codes`; changed.
            codes: the items that are scored, ascending, where these are not the whole catalogue.
        """
        if query.boosts:
            scores[:] = self._boosted(query.boosts, scores, codes)
        for ids in (query.exclude, query.similar_to, query.history if query.exclude_seen else ()):
            if ids:
                self._leave_out(scores, codes, ids)
        if query.candidates is not None:
            self._keep(scores, codes, query.candidates)
        for attribute, condition in query.filters.items():
            scores[~self.items.columns.mask(attribute, condition)[codes]] = EXCLUDED
        # Where categories are bounded, the items of earlier pages still count.
        if query.after is not None and query.cap is None:
            scores[~_behind(query.after, scores, codes)] = EXCLUDED

    def _leave_out(self, scores: Scores, codes: _Part, ids: Sequence[str]) -> None:
        found = self.encoder.item_codes(ids)
        scores[found if isinstance(codes, slice) else np.isin(codes, found)] = EXCLUDED

    def _keep(self, scores: Scores, codes: _Part, ids: Sequence[str]) -> None:
        allowed = np.zeros(len(self.items) + 1, dtype=np.bool_)
        allowed[self.encoder.item_codes(ids)] = True
        scores[~allowed[codes]] = EXCLUDED

    def _boosted(self, boosts: Sequence[Boost], scores: Scores, codes: _Part) -> Numbers:
        total: Numbers = scores.astype(np.float64)
        for boost in boosts:
            changed, amount = self._amounts(boost, codes)
            with np.errstate(over="ignore"):
                if boost.multiply:
                    part = total[changed]
                    total[changed] = np.where(part >= 0, part * amount, part / amount)
                else:
                    total[changed] += amount
            np.clip(total, -_LIMIT, _LIMIT, out=total)
        return total

    def _amounts(self, boost: Boost, codes: _Part) -> tuple[Mask, Numbers | float]:
        """Which of the items `codes` are boosted, and the amount of each of these, or of all."""
        columns = self.items.columns
        if boost.matching is not None:
            return columns.mask(boost.attribute, boost.matching)[codes], boost.amount
        with np.errstate(over="ignore"):
            numbers: Numbers = boost.amount * columns.numbers(boost.attribute)[codes]
        # What would divide by zero, or turn the order around, leaves an item as it is.
        changed: Mask = np.isfinite(numbers)
        if boost.multiply:
            changed &= numbers > 0
        return changed, numbers[changed]


def _behind(position: Position, scores: Scores, codes: _Part) -> Mask:
    """Which items come behind `position`: a lower score, or the same and a greater code."""
    score = np.float32(position.score)
    numbers = np.arange(len(scores)) if isinstance(codes, slice) else codes
    behind: Mask = (scores < score) | ((scores == score) & (numbers > position.code))
    return behind


def is_behind(position: Position, score: float, code: int) -> bool:
    """Whether the item `code` comes behind `position`."""
    return score < position.score or (score == position.score and code > position.code)
