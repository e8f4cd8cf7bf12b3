"""Scores a bundle: exact top-k for users, histories and batches, and items like an item.

Everything precomputed here (item vectors, pooled item features) is post-processing of the released weights and costs
no budget.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lazydp.components.bundle.encoder import QueryEncoder
from lazydp.components.bundle.index import DEPTHS, TARGET_RECALL, ApproximateIndex
from lazydp.components.bundle.items import ItemTable
from lazydp.components.bundle.query import CategoryCap, Query, Ranking, Source
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.topk import Codes, ScoreRows, Scores, in_order, top_k, top_k_rows
from lazydp.components.features.batch import Bags, ItemCatalogue
from lazydp.components.features.spec import HISTORY, ITEM, USER, EmbeddedFeature
from lazydp.components.models.recommender import ModelInputs, Recommender, pool
from lazydp.components.models.two_tower import TwoTower
from lazydp.components.shared.errors import InputError, NonFiniteError, UnavailableError

Matrix: TypeAlias = ScoreRows

# Scores in memory at once, and candidates that a DLRM ranks at once.
_MAX_SCORES = 2**24
_DLRM_BLOCK = 8192
_REASONS = 3
_EXCLUDED = np.float32(-np.inf)
_NOTHING: Codes = np.empty(0, dtype=np.int64)
# Squares of smaller lengths vanish.
_SHORTEST = 1e-18
# Vectors of users that are kept, and made at once.
_MAX_USER_BYTES = 2**27
_USER_BLOCK = 8192
# Item vectors of which a copy is kept with the items side by side: the product of few queries with it is up to three
# times faster. For large catalogues the copy would cost more than it gains.
_MAX_TURNED_BYTES = 2**23
# Queries that recall is measured with, and items of their histories.
_SAMPLED_QUERIES = 256
_SAMPLED_HISTORY = 10


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
        self._popularity = _popularity_scores(bundle)
        self._with_lengths: tuple[Matrix, Scores] | None = None

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
            scores = self._score([query for query, _ in known])
        return self._rankings(known, scores)

    def similar(self, item_id: str, *, k: int, offset: int = 0, filters: Mapping[str, Sequence[str]]) -> Ranking | None:
        """Items nearest to an item by cosine; None where the model does not know the item."""
        code = self.items.code(item_id)
        if not code:
            return None
        vectors, lengths = self._directions()
        scores: Scores = (vectors @ vectors[code]) / (lengths * lengths[code])
        query = Query(k=k, offset=offset, exclude=(item_id,), filters=filters)
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
            return Ranking(
                codes=[],
                scores=np.empty(0, dtype=np.float32),
                source="none",
                unknown_items=self._unknown(query),
                notice=f"{who}, and the bundle carries no privately released popularity to fall back to",
            )
        (answer,) = self._rankings([(query, source)], self._popularity[np.newaxis].copy())
        return replace(answer, notice=f"{who}: these are the most popular items, by counts released with noise")

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
        scores[:, 0] = _EXCLUDED
        for (query, _), row in zip(known, scores, strict=True):
            self._exclude(query, row)
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
                capped = _capped(in_order(scores[row]), self.items, query.cap)
                found[row] = np.fromiter(itertools.islice(capped, wanted), dtype=np.int64)
        for wanted, rows in alike.items():
            together = scores if len(rows) == len(queries) else scores[rows]
            for row, codes in zip(rows, top_k_rows(together, wanted), strict=True):
                found[row] = codes
        return found

    def _ranking_among(self, query: Query, codes: Codes, scores: Scores, source: Source) -> Ranking:
        """The ranking of `codes` [n], which ascend, by their `scores` [n], and of no other item."""
        left_out = self.encoder.item_codes([*query.exclude, *(query.history if query.exclude_seen else ())])
        scores[np.isin(codes, left_out)] = _EXCLUDED
        for attribute, values in query.filters.items():
            scores[~self.items.mask(attribute, values)[codes]] = _EXCLUDED
        wanted = query.offset + query.k + 1
        if query.cap is None:
            order = top_k(scores, wanted)
        else:
            ranked = codes[top_k(scores, len(codes))]
            capped = itertools.islice(_capped(iter(ranked.tolist()), self.items, query.cap), wanted)
            order = np.searchsorted(codes, np.fromiter(capped, dtype=np.int64))
        return self._page(query, codes[order], scores[order], source)

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
        )

    def _exclude(self, query: Query, scores: Scores) -> None:
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


class TwoTowerScorer(Scorer):
    """One matrix product of user vectors with the item vectors, which are computed once.

    A catalogue of `approximate_from` items or more is searched through an approximate index, where that reaches its
    target of recall. Queries that name what to choose from (candidates, filters, a cap) are answered exactly.
    """

    def __init__(self, bundle: Bundle, *, approximate_from: int | None = None) -> None:
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
        self._by_dimension = vectors.T.contiguous() if vectors.nbytes <= _MAX_TURNED_BYTES else vectors.T
        self._users = self._vectors_of_users()
        self._index: ApproximateIndex | None = None
        if approximate_from is not None and self.num_items >= approximate_from:
            self._index, self.index = self._build_index()
            self.recall = None if self._index is None else self._index.recall

    def user_vectors(self, queries: Sequence[Query]) -> Tensor:
        """Vectors [B, D] of the people who ask."""
        if self._users is not None:
            codes = [self.encoder.user_alone(query) for query in queries]
            if all(codes):
                return torch.from_numpy(self._users.take(codes, axis=0))
        return self._towards(*self.encoder.encode(queries))

    def _vectors_of_users(self) -> Matrix | None:
        """Vectors [num_users + 1, D] of users who give nothing but their id; None where there are too many to keep.

        Most requests are theirs, and pooling and the tower take longer than scoring a small catalogue.
        """
        users = self.bundle.spec.tables()[USER] if self.encoder.reads_users else 0
        if not 0 < users * self._model.config.embedding_dim * self._vectors.itemsize <= _MAX_USER_BYTES:
            return None
        blocks = [torch.arange(start, min(start + _USER_BLOCK, users)) for start in range(0, users, _USER_BLOCK)]
        with torch.inference_mode():
            made = torch.cat([self._towards(*self.encoder.encode_users(codes)) for codes in blocks])
        vectors: Matrix = made.numpy()
        return vectors

    def _towards(self, bags: Mapping[str, Bags], dense: Tensor) -> Tensor:
        user = self._model.user_vector(pool(self._model.layout.example, self.bundle.tables, bags), dense)
        # The temperature divides every score alike; here it divides the shorter factor of the product.
        return user / self._model.config.temperature

    def _score(self, queries: Sequence[Query]) -> Matrix:
        scores: Matrix = torch.mm(self.user_vectors(queries), self._by_dimension).numpy()
        return scores

    def _rank_known(self, known: Sequence[tuple[Query, Source]]) -> list[Ranking]:
        if self._index is None:
            return super()._rank_known(known)
        by_depth: dict[int | None, list[int]] = {}
        for number, (query, _) in enumerate(known):
            by_depth.setdefault(_search_depth(query), []).append(number)
        answers: dict[int, Ranking] = {}
        for depth, numbers in by_depth.items():
            part = [known[number] for number in numbers]
            found = super()._rank_known(part) if depth is None else self._rank_found(self._index, part, depth)
            answers.update(zip(numbers, found, strict=True))
        return [answers[number] for number in range(len(known))]

    def _rank_found(self, index: ApproximateIndex, known: Sequence[tuple[Query, Source]], depth: int) -> list[Ranking]:
        """Rankings of what the index finds, by exact scores."""
        with torch.inference_mode():
            users: Matrix = self.user_vectors([query for query, _ in known]).numpy()
        vectors = self._item_vectors()
        rankings = []
        for (query, source), found, user in zip(known, index.search(users, depth), users, strict=True):
            codes: Codes = np.unique(found[found > 0])
            rankings.append(self._ranking_among(query, codes, vectors[codes] @ user, source))
        return rankings

    def _build_index(self) -> tuple[ApproximateIndex | None, str]:
        """The index and what it is; None and why not where search stays exact."""
        with torch.inference_mode():
            queries: Matrix = self._towards(*self._sampled_inputs()).numpy()
        try:
            index = ApproximateIndex.build(self._vectors.numpy(), queries)
        except UnavailableError as error:
            return None, f"exact ({error})"
        if index.recall < TARGET_RECALL:
            return None, f"exact (an approximate index found only {index.recall:.4f} of the best items)"
        return index, index.description

    def _sampled_inputs(self) -> tuple[dict[str, Bags], Tensor]:
        """Inputs of people who might ask: every feature given by half of them, drawn uniformly from what is public."""
        generator = torch.Generator().manual_seed(0)
        features = self._model.layout.example
        given = torch.randint(2, (len(features), _SAMPLED_QUERIES), generator=generator)
        # Of somebody who gives nothing at all there is nothing to rank by.
        given[:1, given.sum(dim=0) == 0] = 1
        bags = {}
        for number, feature in enumerate(features):
            lengths = given[number] * (_SAMPLED_HISTORY if feature.name == HISTORY else 1)
            offsets = torch.zeros(_SAMPLED_QUERIES + 1, dtype=torch.int64)
            torch.cumsum(lengths, 0, out=offsets[1:])
            values = torch.randint(1, max(2, feature.num_rows), (int(offsets[-1]),), generator=generator)
            bags[feature.name] = Bags(values.clamp_(max=feature.num_rows - 1), offsets)
        dense = torch.rand(_SAMPLED_QUERIES, self._model.layout.num_dense, generator=generator) * 2 - 1
        return bags, dense

    def _item_vectors(self) -> Matrix:
        vectors: Matrix = self._vectors.numpy()
        return vectors


class DlrmScorer(Scorer):
    """Candidates of a request through the DLRM in one batch, or the whole of a small catalogue in blocks."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        assert bundle.catalogue is not None
        self._dense = bundle.catalogue.dense
        self._pooled = pooled_items(bundle.model, bundle.tables, bundle.catalogue)

    def _score(self, queries: Sequence[Query]) -> Matrix:
        scores: Matrix = np.full((len(queries), self.num_items + 1), _EXCLUDED, dtype=np.float32)
        starts = range(1, self.num_items + 1, _DLRM_BLOCK)
        for row, (own, dense) in enumerate(self._inputs(queries)):
            for start in starts:
                block = slice(start, min(start + _DLRM_BLOCK, self.num_items + 1))
                scores[row, block] = self._logits(own, dense, block)
        return scores

    def _rank_known(self, known: Sequence[tuple[Query, Source]]) -> list[Ranking]:
        named = [number for number, (query, _) in enumerate(known) if query.candidates is not None]
        if not named:
            return super()._rank_known(known)
        answers = dict(zip(named, self._rank_candidates([known[number] for number in named]), strict=True))
        rest = [number for number in range(len(known)) if number not in answers]
        if rest:
            answers |= zip(rest, super()._rank_known([known[number] for number in rest]), strict=True)
        return [answers[number] for number in range(len(known))]

    def _rank_candidates(self, known: Sequence[tuple[Query, Source]]) -> list[Ranking]:
        """Rankings of the candidates that the queries name, each query's in one batch."""
        rankings = []
        with torch.inference_mode():
            inputs = self._inputs([query for query, _ in known])
            for (query, source), (own, dense) in zip(known, inputs, strict=True):
                assert query.candidates is not None
                codes: Codes = np.unique(np.asarray(self.encoder.item_codes(query.candidates), dtype=np.int64))
                scores = self._logits(own, dense, torch.from_numpy(codes)) if len(codes) else np.empty(0, np.float32)
                rankings.append(self._ranking_among(query, codes, scores, source))
        return rankings

    def _inputs(self, queries: Sequence[Query]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Pooled example-side features [1, D] and dense features [1, n] of each query."""
        bags, dense = self.encoder.encode(queries)
        example = pool(self.bundle.model.layout.example, self.bundle.tables, bags)
        return [
            ({name: vectors[row : row + 1] for name, vectors in example.items()}, dense[row : row + 1])
            for row in range(len(queries))
        ]

    def _logits(self, example: Mapping[str, Tensor], dense: Tensor, codes: slice | Tensor) -> Scores:
        """Scores of the items `codes` for one query."""
        logits = self.bundle.model(
            ModelInputs(
                example=example,
                candidate={name: vectors[codes].unsqueeze(0) for name, vectors in self._pooled.items()},
                dense=dense,
                item_dense=self._dense[codes].unsqueeze(0),
            )
        )
        scores: Scores = logits[0].numpy()
        return scores

    def _item_vectors(self) -> Matrix:
        return torch.cat(list(self._pooled.values()), dim=1).numpy()


def make_scorer(bundle: Bundle, *, approximate_from: int | None = None) -> Scorer:
    """The scorer for the bundle's model; from `approximate_from` items on with an approximate index, None never.

    Raises:
        InputError: the bundle has no items.
    """
    if isinstance(bundle.model, TwoTower):
        return TwoTowerScorer(bundle, approximate_from=approximate_from)
    return DlrmScorer(bundle)


def _search_depth(query: Query) -> int | None:
    """How deep an index must search so that no item is missing once some are left out; None for exact search."""
    if query.candidates is not None or query.filters or query.cap is not None:
        return None
    seen = len(query.history) if query.exclude_seen else 0
    needed = query.offset + query.k + len(query.exclude) + seen
    return next((depth for depth in DEPTHS if needed < depth), None)


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
