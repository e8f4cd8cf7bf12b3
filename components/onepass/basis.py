"""Directions in the space of items that public features span, and those that a noised matrix shows."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy import sparse
from scipy.sparse import linalg

from lazydp.components.features.batch import Bags, ItemCatalogue
from lazydp.components.features.catalogue import TITLE_COLUMN
from lazydp.components.features.spec import ITEM
from lazydp.components.features.vocabulary import hash_code
from lazydp.components.onepass.contributions import Matrix

# Items weigh with this power of their released popularity.
_POWER = 0.35
# Directions weigh with this power of their singular value: otherwise the first, popularity, would take most of the
# length of a history's direction.
_EVENING = -0.25
_BUCKETS = 16
_TITLE_WORDS = 512
_SALT = "title"
# Up to so many columns the Gram matrix of the features is decomposed whole.
_MOST_COLUMNS = 2048
_SMALLEST = 1e-8


def public_features(catalogue: ItemCatalogue, items: pa.Table | None) -> sparse.csr_matrix:
    """Public features of every item code as columns [num_items + 1, p]: ones, codes, buckets of numbers, title words.

    Row 0, of unknown items, is zero.
    """
    rows = catalogue.num_items + 1
    parts = [sparse.csr_matrix(np.ones((rows, 1)))]
    parts += [_codes(bags) for name, bags in catalogue.bags.items() if name != ITEM]
    for column in catalogue.dense.numpy().T:
        buckets = np.clip((column + 1.0) / 2.0 * _BUCKETS, 0, _BUCKETS - 1).astype(np.int64)
        parts.append(sparse.csr_matrix((np.ones(rows), (np.arange(rows), buckets)), shape=(rows, _BUCKETS)))
    if items is not None and items.column(TITLE_COLUMN).null_count < items.num_rows:
        parts.append(_title_words(items.column(TITLE_COLUMN).to_pylist()))
    features = sparse.hstack(parts).tolil()
    features[0] = 0.0
    return sparse.csr_matrix(features.tocsr())


def has_features(catalogue: ItemCatalogue, items: pa.Table | None) -> bool:
    """Whether anything public tells items apart."""
    titled = items is not None and items.column(TITLE_COLUMN).null_count < items.num_rows
    return len(catalogue.bags) > 1 or catalogue.dense.shape[1] > 0 or titled


def _codes(bags: Bags) -> sparse.csr_matrix:
    values, offsets = bags.values.numpy(), bags.offsets.numpy()
    columns = int(values.max(initial=0)) + 1
    return sparse.csr_matrix((np.ones(len(values)), values, offsets), shape=(len(offsets) - 1, columns))


def _title_words(titles: list[str | None]) -> sparse.csr_matrix:
    """Words of titles, hashed; row 0 has none."""
    rows, columns = [], []
    for code, title in enumerate(titles, start=1):
        for word in set(re.findall(r"\w+", (title or "").lower())):
            rows.append(code)
            columns.append(hash_code(word, buckets=_TITLE_WORDS, salt=_SALT))
    shape = (len(titles) + 1, _TITLE_WORDS + 1)
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)


@dataclass(frozen=True, slots=True)
class Basis:
    """Directions that a sketch looks into.

    Attributes:
        columns: orthonormal, [num_items + 1, k].
        weights: [k], of the directions in what a unit contributes; positive.
    """

    columns: Matrix
    weights: Matrix


def empty_basis(num_items: int) -> Basis:
    """No directions, of a catalogue of num_items."""
    return Basis(np.zeros((num_items + 1, 0)), np.zeros(0))


def feature_basis(features: sparse.csr_matrix, popularity: Matrix, *, directions: int) -> Basis:
    """At most so many directions: the leading left singular vectors of the features.

    Items weigh with popularity^0.35, so that the directions tell apart what is taken.

    Args:
        features: as `public_features` gives them.
        popularity: released and positive, [num_items + 1].
        directions: most columns.
    """
    weighted = sparse.diags(popularity**_POWER) @ features
    if weighted.shape[1] <= _MOST_COLUMNS:
        values, vectors = np.linalg.eigh(np.asarray((weighted.T @ weighted).todense()))
        order = np.argsort(-values)[:directions]
        vectors, lengths = vectors[:, order], np.sqrt(np.maximum(values[order], 0.0))
        kept = lengths > _SMALLEST * lengths[0]
        found, lengths = np.asarray(weighted @ vectors[:, kept]) / lengths[kept], lengths[kept]
    else:
        # A start vector of its own, so that the same features give the same directions.
        number = min(directions, min(weighted.shape) - 1)
        found, lengths, _ = linalg.svds(weighted, k=number, v0=np.ones(min(weighted.shape)))
        found, lengths = found[:, ::-1], lengths[::-1]
    return _orthonormal(found, np.maximum(lengths / lengths[0], _SMALLEST) ** _EVENING)


def with_eigenvectors(basis: Basis, items: np.ndarray, eigenvectors: Matrix) -> Basis:
    """`basis` and the `eigenvectors` [M, n] over the items `items`, orthonormal together."""
    spread = np.zeros((basis.columns.shape[0], eigenvectors.shape[1]))
    spread[items] = eigenvectors
    return _orthonormal(np.hstack([basis.columns, spread]), np.append(basis.weights, np.ones(spread.shape[1])))


def _orthonormal(vectors: Matrix, weights: Matrix) -> Basis:
    """An orthonormal basis of the columns, without those that the ones before them span."""
    q, r = np.linalg.qr(vectors)
    kept = np.abs(np.diag(r)) > _SMALLEST * np.abs(np.diag(r)).max(initial=1.0)
    return Basis(np.asarray(q[:, kept]), weights[kept])
