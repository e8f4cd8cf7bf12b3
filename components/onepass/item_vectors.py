"""From noised statistics to one vector an item: all of it computed from what is released.

G, the symmetric matrix of how much items go together, is known through a sketch B = G F (F orthonormal) or, for the
most popular items, directly. Its leading eigenvectors, without what looks like noise, are scaled so that the dot
product of an item's vector with the pooled vectors of a history is that history's part of a logit, beside the prior.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import eigh

from lazydp.components.onepass.contributions import Matrix

# Of the noise's largest eigenvalue, what is taken off the eigenvalues.
_SHRINK = 0.3
# Eigenvalues far above this share of the largest count alike, those below in proportion.
_RIDGE = 0.05
# Popular items have larger entries of G than their part in a logit is.
_POPULARITY = 0.4
_REFILLS = 5


def sketched_eigenvectors(sketch: Matrix, basis: Matrix, *, std: float, rank: int) -> tuple[Matrix, np.ndarray]:
    """Eigenvectors [num_items + 1, <= rank] and positive eigenvalues of G, completed from its sketch.

    With C = sym(F' B) the completion is B F' + F (B - F C)': exact for what F spans, and zero where F sees nothing.

    Args:
        sketch: B, [num_items + 1, k].
        basis: F, orthonormal, [num_items + 1, k].
        std: of the noise on B.
        rank: most eigenvectors.
    """
    directions = basis.shape[1]
    core = basis.T @ sketch
    core = (core + core.T) / 2
    spanned, triangle = np.linalg.qr(np.hstack([basis, sketch - basis @ core]))
    middle = np.zeros((2 * directions, 2 * directions))
    middle[:directions, :directions] = core
    middle[directions:, :directions] = middle[:directions, directions:] = np.eye(directions)
    values, vectors = np.linalg.eigh(triangle @ middle @ triangle.T)
    edge = std * (math.sqrt(sketch.shape[0]) + math.sqrt(directions))
    return _shrunk(spanned @ vectors, values, edge=edge, rank=rank)


def matrix_eigenvectors(matrix: Matrix, *, std: float, rank: int, refill: bool) -> tuple[Matrix, np.ndarray]:
    """Eigenvectors [M, <= rank] and positive eigenvalues of a noised symmetric matrix, the largest first.

    Args:
        matrix: [M, M].
        std: of the noise on its diagonal.
        rank: most eigenvectors.
        refill: the diagonal means nothing (an item is never in the history before it): take it from the low-rank
            approximation instead.
    """
    rank = min(rank, matrix.shape[0])
    edge = std * math.sqrt(2.0 * matrix.shape[0])
    for _ in range(_REFILLS if refill else 0):
        values, vectors = _leading(matrix, rank)
        np.fill_diagonal(matrix, np.square(vectors) @ np.maximum(values, 0.0))
    values, vectors = _leading(matrix, rank)
    return _shrunk(vectors, values, edge=edge, rank=rank)


def above_noise(matrix: Matrix, *, std: float, fewest: int, most: int) -> Matrix:
    """The leading eigenvectors [M, n] of a noised matrix: those beyond the noise's largest, within bounds."""
    values, vectors = _leading(matrix, min(most, matrix.shape[0]))
    number = max(fewest, int((values > std * math.sqrt(2.0 * matrix.shape[0])).sum()))
    return vectors[:, :number]


def _leading(matrix: Matrix, number: int) -> tuple[np.ndarray, Matrix]:
    size = matrix.shape[0]
    values, vectors = eigh(matrix, subset_by_index=(size - number, size - 1))
    return values[::-1], np.asarray(vectors[:, ::-1])


def _shrunk(vectors: Matrix, values: np.ndarray, *, edge: float, rank: int) -> tuple[Matrix, np.ndarray]:
    order = np.argsort(-values)[:rank]
    left = values[order] - _SHRINK * edge
    kept = left > 0.0
    return vectors[:, order[kept]], left[kept]


def item_vectors(
    vectors: Matrix, values: np.ndarray, popularity: Matrix, *, items: np.ndarray | None = None, dim: int, scale: float
) -> Matrix:
    """One vector an item, [num_items + 1, dim]; zero for the unknown item and for items of which nothing is known.

    Args:
        vectors: eigenvectors of G over `items` (all codes where None).
        values: their eigenvalues, positive.
        popularity: released and positive, [num_items + 1].
        items: codes.
        scale: typical (root mean square) dot product of the vectors of two items drawn by popularity.
        dim: columns; those beyond the number of eigenvectors are zero.
    """
    codes = np.arange(len(popularity)) if items is None else items
    found = np.zeros((len(popularity), dim))
    if values.size:
        weights = np.sqrt(values / (values + _RIDGE * values.max()))
        scaled = vectors * weights / popularity[codes, np.newaxis] ** _POPULARITY
        share = popularity[codes] / popularity[codes].sum()
        typical = math.sqrt(float(np.square(scaled.T @ (share[:, np.newaxis] * scaled)).sum()))
        found[codes, : values.size] = scaled * math.sqrt(scale / typical) if typical > 0.0 else 0.0
    found[0] = 0.0
    return found
