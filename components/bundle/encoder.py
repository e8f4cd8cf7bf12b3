"""Turns queries into the inputs of a model: the same codes and the same scaling as ingest."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lazydp.components.bundle.query import Known, Query
from lazydp.components.bundle.reader import Bundle
from lazydp.components.features.batch import Bags
from lazydp.components.features.request import encode_requests
from lazydp.components.features.spec import HISTORY, USER, FeatureSpec, ListFeature
from lazydp.components.features.vocabulary import INTEGER_TEXT, Vocabulary, hash_code
from lazydp.components.features.vocabulary_spec import BucketVocabulary, HashedVocabulary, IntegerVocabulary
from lazydp.components.shared.errors import InputError

_INTEGER = re.compile(INTEGER_TEXT)
_KEPT_CODES = 1024

CodeOf: TypeAlias = Callable[[str], int]
Numbers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class EncodedQueries:
    """Inputs of the example side of a model for B queries.

    Attributes:
        bags: one bag a query, by example feature.
        dense: dense features [B, n].
        weights: by feature the weights of its lookups, where the queries give any.
    """

    bags: Mapping[str, Bags]
    dense: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)


class QueryEncoder:
    """Encodes queries for the example side of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._spec = bundle.spec
        self._vocabularies = bundle.vocabularies
        self._items = bundle.items
        # A model need not read all that the spec describes (`user: history` of a two-tower model).
        layout = bundle.model.layout
        read = {feature.name for feature in layout.example}
        self._embedded = [feature for feature in bundle.spec.embedded("user", "context") if feature.name in read]
        dense = bundle.spec.dense("user", "context") if layout.num_dense else []
        self.features = tuple(feature.name for feature in (*self._embedded, *dense))
        self.reads_users = USER in read
        self.reads_history = HISTORY in read
        self._hashes_users = self.reads_users and isinstance(bundle.spec.vocabularies()[USER], HashedVocabulary)
        self._user_code: CodeOf | None = None
        if self.reads_users:
            # Codes of the latest users are kept, since one query asks for its user's code several times.
            lookup = _lookup(bundle.spec, bundle.vocabularies[USER], USER)
            self._user_code = functools.lru_cache(maxsize=_KEPT_CODES)(lookup)

    def user_code(self, user_id: str | None) -> int:
        """Code of a user, 0 where unknown or where the model does not read users."""
        return 0 if user_id is None or self._user_code is None else self._user_code(user_id)

    def knows(self, user_id: str | None) -> Known | None:
        """Whether a user is of the vocabulary; None where none is named, or where the model reads no users.

        A hash has a row for everybody, and whether a row was trained is what differential privacy hides: any rule that
        told a user who was never seen from a known one would answer whether a person is in the training data.
        """
        if user_id is None or not self.reads_users:
            return None
        if self._hashes_users:
            return "cannot tell"
        return "yes" if self.user_code(user_id) else "no"

    def item_codes(self, ids: Sequence[str]) -> list[int]:
        """Codes of those of `ids` that the model knows, in order."""
        if self._items is None:
            return []
        code = self._items.code
        return [found for name in ids if (found := code(name))]

    def encode(self, queries: Sequence[Query]) -> EncodedQueries:
        """Inputs for `queries`.

        A user that is absent or unknown is an empty bag: it adds nothing, where row 0 would add its noise.

        Raises:
            InputError: a feature that the model does not have, a value of the wrong kind, or weights that do not fit.
        """
        bags, dense = self._features(queries)
        weights: dict[str, Tensor] = {}
        if self.reads_users:
            bags[USER] = _bags([[code] if (code := self.user_code(query.user_id)) else [] for query in queries])
        if self._spec.history is not None:
            longest = self._spec.history.max_length
            codes = [self.item_codes(query.history)[-longest:] for query in queries]
            bags[HISTORY] = _bags(codes)
            if any(query.history_weights is not None or query.half_life is not None for query in queries):
                parts = [self._history_weights(query, len(part)) for query, part in zip(queries, codes, strict=True)]
                weights[HISTORY] = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        return EncodedQueries(bags, dense, weights)

    def _history_weights(self, query: Query, count: int) -> Numbers:
        """Weights of the latest `count` known items of the history; their mean is 1, so that only ratios matter."""
        weights = np.ones(count)
        if query.history_weights is not None:
            known = self.known(query.history, query.history_weights)
            weights *= np.asarray([weight for _, weight in known[len(known) - count :]])
        if query.half_life is not None:
            weights *= 0.5 ** (np.arange(count - 1, -1, -1) / query.half_life)
        return weights / weights.mean() if count else weights

    def known(self, ids: Sequence[str], weights: Sequence[float] | None) -> list[tuple[int, float]]:
        """Code and weight of those of `ids` that the model knows, in order; None weighs all alike.

        Raises:
            InputError: another number of weights than of ids.
        """
        given = [1.0] * len(ids) if weights is None else weights
        if len(given) != len(ids):
            raise InputError(f"expected a weight for each of {len(ids)} items, found {len(given)}")
        assert self._items is not None
        code = self._items.code
        return [(found, weight) for name, weight in zip(ids, given, strict=True) if (found := code(name))]

    def encode_users(self, codes: Tensor) -> EncodedQueries:
        """What `encode` makes of people who give nothing but the id of a known user; codes int64 [B]."""
        bags, dense = self._features([Query()] * codes.numel())
        bags[USER] = Bags.single(codes)
        if self._spec.history is not None:
            bags[HISTORY] = _bags([[]] * codes.numel())
        return EncodedQueries(bags, dense)

    def user_alone(self, query: Query) -> int:
        """Code of the user where the model reads nothing else of `query`, else 0."""
        if query.features or (self.reads_history and query.history):
            return 0
        return self.user_code(query.user_id)

    def _features(self, queries: Sequence[Query]) -> tuple[dict[str, Bags], Tensor]:
        if not any(query.features for query in queries):
            # All missing, which needs no column of anything: this path answers most requests.
            absent = {f.name: [[] if isinstance(f, ListFeature) else [0]] * len(queries) for f in self._embedded}
            return {name: _bags(codes) for name, codes in absent.items()}, torch.zeros(
                len(queries), self._spec.num_dense
            )
        for query in queries:
            odd = query.features.keys() - set(self.features)
            if odd:
                known = ", ".join(self.features) or "none"
                raise InputError(f"there is no feature {min(odd)!r}; this model reads: {known}")
        batch = encode_requests(
            self._spec,
            self._vocabularies,
            users=[None] * len(queries),
            histories=[[]] * len(queries),
            features=[query.features for query in queries],
        )
        return dict(batch.bags), batch.dense


def _bags(codes: Sequence[Sequence[int]]) -> Bags:
    offsets = np.zeros(len(codes) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in codes], out=offsets[1:])
    flat = np.fromiter((code for part in codes for code in part), dtype=np.int64, count=int(offsets[-1]))
    return Bags(torch.from_numpy(flat), torch.from_numpy(offsets))


def _integer_code(text: str, *, size: int, first: int) -> int:
    if _INTEGER.fullmatch(text) is None:
        return 0
    code = int(text) - first + 1
    return code if 1 <= code <= size else 0


def _lookup(spec: FeatureSpec, vocabulary: Vocabulary, table: str) -> CodeOf:
    """A one-value encoder equal to `vocabulary.encode`, without the cost of a column of one."""
    match spec.vocabularies()[table]:
        case HashedVocabulary(buckets=buckets, salt=salt):
            # An empty text is nobody, as in ingest.
            return lambda text: hash_code(text, buckets=buckets, salt=salt) if text else 0
        case IntegerVocabulary(size=size, first=first):
            return lambda text: _integer_code(text, size=size, first=first)
        case BucketVocabulary():
            return lambda text: int(vocabulary.encode([text])[0])
        case _:
            values = vocabulary.values()
            assert values is not None
            codes: dict[str, int] = {value: code for code, value in enumerate(values.to_pylist(), start=1)}
            return lambda text: codes.get(text, 0)
