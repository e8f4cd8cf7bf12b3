"""What every scorer does: exclusions, pages, reasons, fallbacks; one subclass per kind of model."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch

from lazydp.components.bundle.encoder import QueryEncoder
from lazydp.components.bundle.items import ItemTable
from lazydp.components.bundle.query import CategoryCap, Query, Ranking, Source
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.selection import EXCLUDED, Selection, is_behind
from lazydp.components.bundle.topk import Codes, ScoreRows, Scores, in_order, top_k, top_k_rows
from lazydp.components.shared.errors import InputError

Matrix: TypeAlias = ScoreRows
# Scores in memory at once, and candidates that a DLRM ranks at once.
_MAX_SCORES = 2**24
_REASONS = 3
_NOTHING: Codes = np.empty(0, dtype=np.int64)
# Squares of smaller lengths vanish.
_SHORTEST = 1e-18


class Scorer(ABC):
    """Answers queries from one bundle. Safe to call from several threads.

    Attributes:
        bundle: what it scores.
        items: the bundle's items.
        num_items: items of the catalogue.
        index: how items are found, for a person to read.
        recall: share of the exact best 100 items that an approximate index finds; None where the search is exact.
    """

    index = "exact"
    recall: float | None = None

    def __init__(self, bundle: Bundle) -> None:
        if bundle.items is None or bundle.catalogue is None:
            raise InputError(f"bundle {bundle.path} has no items, so there is nothing to recommend")
        self.bundle = bundle
        self.items: ItemTable = bundle.items
        self.num_items = len(self.items)
        self.encoder = QueryEncoder(bundle)
        self._selection = Selection(self.items, self.encoder)
        self._popularity = _popularity_scores(bundle)
        self._with_lengths: tuple[Matrix, Scores] | None = None

    @abstractmethod
    def scores(self, queries: Sequence[Query]) -> Matrix:
        """Scores [B, num_items + 1] of every item code for every query; column 0 is never answered with."""

    @abstractmethod
    def _item_vectors(self) -> Matrix:
        """Vectors [num_items + 1, d] whose cosine says how alike two items are."""

    def rank(self, queries: Sequence[Query]) -> list[Ranking]:
        """The best items for each query.

        Raises:
            InputError: a query names a feature or attribute that the model does not have, or weights do not fit.
        """
        apart = [number for number, query in enumerate(queries) if query.alone or query.similar_to]
        if not apart:
            return self._rank_people(queries)
        together = [number for number, query in enumerate(queries) if not (query.alone or query.similar_to)]
        answers = dict(zip(together, self._rank_people([queries[number] for number in together]), strict=True))
        for number in apart:
            query = queries[number]
            answers[number] = self._rank_similar(query) if query.similar_to else self._rank_people([query])[0]
        return [answers[number] for number in range(len(queries))]

    def _rank_people(self, queries: Sequence[Query]) -> list[Ranking]:
        sources = [self._source(query) for query in queries]
        scored = [index for index, source in enumerate(sources) if source not in ("popular", "none")]
        size = max(1, _MAX_SCORES // (self.num_items + 1))
        if 0 < len(scored) == len(queries) <= size:
            return self._rank_known(list(zip(queries, sources, strict=True)))
        answers: dict[int, Ranking] = {}
        for start in range(0, len(scored), size):
            block = scored[start : start + size]
            known = [(queries[index], sources[index]) for index in block]
            answers.update(zip(block, self._rank_known(known), strict=True))
        for index, source in enumerate(sources):
            if index not in answers:
                answers[index] = self._fallback(queries[index], source)
        return [answers[index] for index in range(len(queries))]

    def _rank_known(self, known: Sequence[tuple[Query, Source]]) -> list[Ranking]:
        """Rankings for people of whom the model knows something, by the scores of the whole catalogue."""
        with torch.inference_mode():
            scores = self.scores([query for query, _ in known])
        return self._rankings(known, scores)

    def _rank_similar(self, query: Query) -> Ranking:
        """Items by the weighted mean of their cosines with those of `query.similar_to` that the model knows."""
        liked = self.encoder.known(query.similar_to, query.similar_weights)
        if not liked:
            one = len(query.similar_to) == 1
            return self._nothing(
                query, f"the model {'does not know this item' if one else 'knows none of these items'}"
            )
        vectors, lengths = self._directions()
        codes = [code for code, _ in liked]
        weights = np.asarray([weight for _, weight in liked])
        shares = (weights / weights.sum()).astype(np.float32) / lengths[codes]
        scores: Scores = (vectors @ (shares @ vectors[codes])) / lengths
        return self._rankings([(query, "item")], scores[np.newaxis])[0]

    def warm(self, query: Query) -> None:
        """Touch everything that requests like `query` need, so that the first one is as fast as the rest."""
        self.rank([query])
        self._directions()

    def _source(self, query: Query) -> Source:
        user = bool(self.encoder.user_code(query.user_id))
        history = self.encoder.reads_history and any(self.items.code(item) for item in query.history)
        if user and history:
            return "user+history"
        if user:
            return "user"
        if history:
            return "history"
        if query.features:
            return "features"
        return "popular" if self._popularity is not None else "none"

    def _fallback(self, query: Query, source: Source) -> Ranking:
        """For somebody the model knows nothing of: the released popularity, or no answer and why."""
        who = self._why_unknown(query)
        if self._popularity is None:
            return self._nothing(
                query, f"{who}, and the bundle carries no privately released popularity to fall back to"
            )
        (answer,) = self._rankings([(query, source)], self._popularity[np.newaxis].copy())
        return replace(answer, notice=f"{who}: these are the most popular items, by counts released with noise")

    def _nothing(self, query: Query, notice: str) -> Ranking:
        scores: Scores = np.empty(0, dtype=np.float32)
        return Ranking(
            codes=[],
            scores=scores,
            source="none",
            unknown_items=self._unknown(query),
            notice=notice,
            user_known=self.encoder.knows(query.user_id),
        )

    def _why_unknown(self, query: Query) -> str:
        if query.user_id is not None and not query.history:
            if self.encoder.reads_users:
                return "the model does not know this user, and no history was given"
            return "the model knows nobody by id, and no history was given"
        if query.history:
            reads = "knows none of the items of the history" if self.encoder.reads_history else "reads no history"
            return f"the model {reads}" + ("" if query.user_id is None else " and does not know this user")
        return "nothing was said about the person: neither a user id nor a history"

    def _rankings(self, known: Sequence[tuple[Query, Source]], scores: Matrix) -> list[Ranking]:
        """Rankings of the whole catalogue by `scores` [B, num_items + 1], which are changed."""
        for (query, _), row in zip(known, scores, strict=True):
            self._selection.apply(query, row)
        scores[:, 0] = EXCLUDED
        found = self._found([query for query, _ in known], scores)
        return [
            self._page(query, codes, row[codes], source)
            for (query, source), codes, row in zip(known, found, scores, strict=True)
        ]

    def _found(self, queries: Sequence[Query], scores: Matrix) -> list[Codes]:
        """For each query the best codes by its row of `scores`, as many as reach one past the end of its page."""
        found: list[Codes] = [_NOTHING] * len(queries)
        alike: dict[int, list[int]] = {}
        for row, query in enumerate(queries):
            wanted = query.offset + query.k + 1
            if query.cap is None:
                alike.setdefault(wanted, []).append(row)
            else:
                capped = self._capped(query, query.cap, in_order(scores[row]), scores[row].item)
                found[row] = np.fromiter(itertools.islice(capped, wanted), dtype=np.int64)
        for wanted, rows in alike.items():
            together = scores if len(rows) == len(queries) else scores[rows]
            for row, codes in zip(rows, top_k_rows(together, wanted), strict=True):
                found[row] = codes
        return found

    def _ranking_among(self, query: Query, codes: Codes, scores: Scores, source: Source) -> Ranking:
        """The ranking of `codes` [n], which ascend, by their `scores` [n], and of no other item."""
        self._selection.apply(query, scores, codes)
        wanted = query.offset + query.k + 1
        if query.cap is None:
            order = top_k(scores, wanted)
        else:
            ranked = codes[top_k(scores, len(codes))]

            def score_of(code: int) -> float:
                return float(scores[np.searchsorted(codes, code)])

            capped = itertools.islice(self._capped(query, query.cap, iter(ranked.tolist()), score_of), wanted)
            order = np.searchsorted(codes, np.fromiter(capped, dtype=np.int64))
        return self._page(query, codes[order], scores[order], source)

    def _capped(
        self, query: Query, cap: CategoryCap, ranked: Iterator[int], score_of: Callable[[int], float]
    ) -> Iterator[int]:
        """The `ranked` codes within the bounds of their categories, from where the page of `query` begins."""
        capped = _capped(ranked, self.items, cap)
        after = query.after
        return capped if after is None else (code for code in capped if is_behind(after, score_of(code), code))

    def _page(self, query: Query, ranked: Codes, scores: Scores, source: Source) -> Ranking:
        """The page that `query` asks for, from codes `ranked` best first, to one past its end, with their `scores`."""
        end = query.offset + query.k
        page: Codes = ranked[query.offset : end]
        return Ranking(
            codes=page.tolist(),
            scores=scores[query.offset : end],
            source=source,
            more=ranked.shape[0] > end,
            unknown_items=self._unknown(query),
            reasons=self._reasons(query, page) if query.explain else (),
            user_known=self.encoder.knows(query.user_id),
        )

    def _unknown(self, query: Query) -> Sequence[str]:
        if not (query.history or query.similar_to or query.candidates):
            return ()
        code = self.items.code
        return [item for item in (*query.history, *query.similar_to, *(query.candidates or ())) if not code(item)]

    def _reasons(self, query: Query, page: Codes) -> list[list[int]]:
        given = self.encoder.item_codes(query.similar_to or query.history)
        history = np.asarray(list(dict.fromkeys(given)), dtype=np.int64)
        if not history.shape[0]:
            return [[] for _ in page]
        vectors, lengths = self._directions()
        # The length of the answered item scales its whole row, so it changes no order.
        nearness = (vectors[page] @ vectors[history].T) / lengths[history]
        best = np.argsort(-nearness, axis=1, kind="stable")[:, :_REASONS]
        return [[int(code) for code in history[row] if code != item] for row, item in zip(best, page, strict=True)]

    def _directions(self) -> tuple[Matrix, Scores]:
        """Vectors that say how alike items are, and their lengths [num_items + 1], never 0."""
        if self._with_lengths is None:
            vectors = self._item_vectors()
            lengths: Scores = np.maximum(np.linalg.norm(vectors, axis=1), np.float32(_SHORTEST))
            self._with_lengths = vectors, lengths
        return self._with_lengths


def _popularity_scores(bundle: Bundle) -> Scores | None:
    return None if bundle.popularity is None else bundle.popularity.numpy()


def _capped(ranked: Iterator[int], items: ItemTable, cap: CategoryCap) -> Iterator[int]:
    """The ranked codes without those whose category is full; an item of several categories counts in each."""
    taken: dict[str, int] = {}
    for code in ranked:
        categories = items.columns.values(cap.attribute, code)
        if all(taken.get(category, 0) < cap.limit for category in categories):
            for category in categories:
                taken[category] = taken.get(category, 0) + 1
            yield code
