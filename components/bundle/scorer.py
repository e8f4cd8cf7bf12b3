"""Scores a bundle: exact top-k for users, histories and batches, and items like an item.

Everything precomputed here (item vectors, pooled item features) is post-processing of the released weights and costs
no budget.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lazydp.components.bundle.encoder import QueryEncoder
from lazydp.components.bundle.items import ItemTable
from lazydp.components.bundle.query import CategoryCap, Query, Ranking, Source
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.topk import Codes, Scores, in_order, top_k
from lazydp.components.features.batch import ItemCatalogue
from lazydp.components.features.spec import ITEM, EmbeddedFeature
from lazydp.components.models.recommender import ModelInputs, Recommender, pool
from lazydp.components.models.two_tower import TwoTower
from lazydp.components.shared.errors import InputError, NonFiniteError

Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]

# Scores in memory at once, and candidates that a DLRM ranks at once.
_MAX_SCORES = 2**24
_DLRM_BLOCK = 8192
_REASONS = 3
_EXCLUDED = np.float32(-np.inf)


class Scorer(ABC):
    """Answers queries from one bundle. Safe to call from several threads.

    Attributes:
        bundle: what it scores.
        items: the bundle's items.
        num_items: items of the catalogue.
        index: how items are found, for a person to read.
    """

    index = "exact"

    def __init__(self, bundle: Bundle) -> None:
        if bundle.items is None or bundle.catalogue is None:
            raise InputError(f"bundle {bundle.path} has no items, so there is nothing to recommend")
        self.bundle = bundle
        self.items: ItemTable = bundle.items
        self.num_items = len(self.items)
        self.encoder = QueryEncoder(bundle)
        self._popularity = _popularity_scores(bundle)
        self._unit_vectors: Matrix | None = None

    @abstractmethod
    def _score(self, queries: Sequence[Query]) -> Matrix:
        """Scores [B, num_items + 1] of every item code for every query; column 0 is never answered with."""

    @abstractmethod
    def _item_vectors(self) -> Matrix:
        """Vectors [num_items + 1, d] whose cosine says how alike two items are."""

    def rank(self, queries: Sequence[Query]) -> list[Ranking]:
        """The best items for each query.

        Raises:
            InputError: a query names a feature or attribute that the model does not have.
        """
        sources = [self._source(query) for query in queries]
        scored = [index for index, source in enumerate(sources) if source not in ("popular", "none")]
        answers: dict[int, Ranking] = {}
        size = max(1, _MAX_SCORES // (self.num_items + 1))
        for start in range(0, len(scored), size):
            block = scored[start : start + size]
            with torch.inference_mode():
                scores = self._score([queries[index] for index in block])
            for row, index in enumerate(block):
                answers[index] = self._ranking(queries[index], scores[row], sources[index])
        for index, source in enumerate(sources):
            if index not in answers:
                answers[index] = self._fallback(queries[index], source)
        return [answers[index] for index in range(len(queries))]

    def similar(self, item_id: str, *, k: int, offset: int = 0, filters: Mapping[str, Sequence[str]]) -> Ranking | None:
        """Items nearest to an item by cosine; None where the model does not know the item."""
        code = self.items.code(item_id)
        if not code:
            return None
        vectors = self._units()
        scores: Scores = vectors @ vectors[code]
        query = Query(k=k, offset=offset, exclude=(item_id,), filters=filters)
        return self._ranking(query, scores, "item")

    def warm(self) -> None:
        """Touch everything that a request needs, so that the first one is as fast as the rest."""
        self.rank([Query(user_id="", history=self.items.ids[:1], k=1)])
        self._units()

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
            return Ranking(
                codes=[],
                scores=[],
                source="none",
                unknown_items=self._unknown(query),
                notice=f"{who}, and the bundle carries no privately released popularity to fall back to",
            )
        answer = self._ranking(query, self._popularity.copy(), source)
        return Ranking(
            codes=answer.codes,
            scores=answer.scores,
            source="popular",
            more=answer.more,
            unknown_items=answer.unknown_items,
            notice=f"{who}: these are the most popular items, by counts released with noise",
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

    def _ranking(self, query: Query, scores: Scores, source: Source) -> Ranking:
        self._exclude(query, scores)
        wanted = query.offset + query.k
        if query.cap is None:
            found = top_k(scores, wanted + 1)
        else:
            capped = _capped(in_order(scores), self.items, query.cap)
            found = np.fromiter((code for code, _ in zip(capped, range(wanted + 1), strict=False)), dtype=np.int64)
        page: Codes = found[query.offset : wanted]
        return Ranking(
            codes=page.tolist(),
            scores=scores[page].tolist(),
            source=source,
            more=found.shape[0] > wanted,
            unknown_items=self._unknown(query),
            reasons=self._reasons(query, page) if query.explain else (),
        )

    def _exclude(self, query: Query, scores: Scores) -> None:
        scores[0] = _EXCLUDED
        if query.exclude:
            scores[self.encoder.item_codes(query.exclude)] = _EXCLUDED
        if query.exclude_seen and query.history:
            scores[self.encoder.item_codes(query.history)] = _EXCLUDED
        if query.candidates is not None:
            allowed = np.zeros(scores.shape[0], dtype=np.bool_)
            allowed[self.encoder.item_codes(query.candidates)] = True
            scores[~allowed] = _EXCLUDED
        for attribute, values in query.filters.items():
            scores[~self.items.mask(attribute, values)] = _EXCLUDED

    def _unknown(self, query: Query) -> list[str]:
        code = self.items.code
        return [item for item in (*query.history, *(query.candidates or ())) if not code(item)]

    def _reasons(self, query: Query, page: Codes) -> list[list[int]]:
        history = np.asarray(list(dict.fromkeys(self.encoder.item_codes(query.history))), dtype=np.int64)
        if not history.shape[0]:
            return [[] for _ in page]
        vectors = self._units()
        nearness = vectors[page] @ vectors[history].T
        best = np.argsort(-nearness, axis=1, kind="stable")[:, :_REASONS]
        return [[int(code) for code in history[row] if code != item] for row, item in zip(best, page, strict=True)]

    def _units(self) -> Matrix:
        if self._unit_vectors is None:
            vectors = self._item_vectors()
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            self._unit_vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return self._unit_vectors


class TwoTowerScorer(Scorer):
    """One matrix product of user vectors with the item vectors, which are computed once."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        assert isinstance(bundle.model, TwoTower)
        assert bundle.catalogue is not None
        self._model: TwoTower = bundle.model
        pooled = pooled_items(bundle.model, bundle.tables, bundle.catalogue)
        with torch.inference_mode():
            vectors = self._model.item_vector(pooled, bundle.catalogue.dense)
        if not bool(torch.isfinite(vectors).all()):
            raise NonFiniteError(f"bundle {bundle.path}: an item's vector is not finite; export the run again")
        self._vectors = vectors
        # The temperature scales every score alike; folding it in saves a pass over the scores.
        self._scaled = vectors / self._model.config.temperature

    def user_vectors(self, queries: Sequence[Query]) -> Tensor:
        """Vectors [B, D] of the people who ask."""
        bags, dense = self.encoder.encode(queries)
        return self._model.user_vector(pool(self._model.layout.example, self.bundle.tables, bags), dense)

    def _score(self, queries: Sequence[Query]) -> Matrix:
        scores: Matrix = functional.linear(self.user_vectors(queries), self._scaled).numpy()
        return scores

    def _item_vectors(self) -> Matrix:
        vectors: Matrix = self._vectors.numpy()
        return vectors


class DlrmScorer(Scorer):
    """The whole catalogue through the DLRM, in blocks: for small catalogues, or for the candidates of a request."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        assert bundle.catalogue is not None
        self._dense = bundle.catalogue.dense
        self._pooled = pooled_items(bundle.model, bundle.tables, bundle.catalogue)

    def _score(self, queries: Sequence[Query]) -> Matrix:
        bags, dense = self.encoder.encode(queries)
        model = self.bundle.model
        example = pool(model.layout.example, self.bundle.tables, bags)
        scores: Matrix = np.full((len(queries), self.num_items + 1), _EXCLUDED, dtype=np.float32)
        for row, query in enumerate(queries):
            own = {name: vectors[row : row + 1] for name, vectors in example.items()}
            for codes in self._blocks(query):
                logits = model(
                    ModelInputs(
                        example=own,
                        candidate={name: vectors[codes].unsqueeze(0) for name, vectors in self._pooled.items()},
                        dense=dense[row : row + 1],
                        item_dense=self._dense[codes].unsqueeze(0),
                    )
                )
                scores[row, codes] = logits[0].numpy()
        return scores

    def _blocks(self, query: Query) -> Iterator[slice | list[int]]:
        if query.candidates is not None:
            codes = sorted(set(self.encoder.item_codes(query.candidates)))
            yield from (codes[start : start + _DLRM_BLOCK] for start in range(0, len(codes), _DLRM_BLOCK))
        else:
            starts = range(1, self.num_items + 1, _DLRM_BLOCK)
            yield from (slice(start, min(start + _DLRM_BLOCK, self.num_items + 1)) for start in starts)

    def _item_vectors(self) -> Matrix:
        return torch.cat(list(self._pooled.values()), dim=1).numpy()


def make_scorer(bundle: Bundle) -> Scorer:
    """The scorer for the bundle's model.

    Raises:
        InputError: the bundle has no items.
    """
    return TwoTowerScorer(bundle) if isinstance(bundle.model, TwoTower) else DlrmScorer(bundle)


def pooled_items(model: Recommender, tables: Mapping[str, Tensor], catalogue: ItemCatalogue) -> dict[str, Tensor]:
    """Pooled rows [num_items + 1, D] of each item-side feature, by item code."""

    def rows(feature: EmbeddedFeature) -> Tensor:
        # The bag of an item's id is the code itself: the table is its own pooling, and needs no copy.
        if feature.name == ITEM:
            return tables[feature.table]
        return pool([feature], tables, {feature.name: catalogue.bags[feature.name]})[feature.name]

    return {feature.name: rows(feature) for feature in model.layout.candidate}


def _popularity_scores(bundle: Bundle) -> Scores | None:
    return None if bundle.popularity is None else bundle.popularity.numpy()


def _capped(ranked: Iterator[int], items: ItemTable, cap: CategoryCap) -> Iterator[int]:
    """The ranked codes without those whose category is full; an item of several categories counts in each."""
    taken: dict[str, int] = {}
    for code in ranked:
        categories = items.values(cap.attribute, code)
        if all(taken.get(category, 0) < cap.limit for category in categories):
            for category in categories:
                taken[category] = taken.get(category, 0) + 1
            yield code
