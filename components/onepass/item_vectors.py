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
from lazydp.components.onepass.rules import RULE, Rule

# The diagonal of a matrix is not released. It is taken from the matrix's leading eigenvectors, in so many rounds.
_REFILLS, _REFILLS_OF_DIRECTIONS = 5, 2
_SMALLEST = 1e-12
# Directions in which the released rows of the basis are shorter than this part of the longest are not fitted.
_SMALLEST_FITTED = 1e-3


def sketched_eigenvectors(
    sketch: Matrix,
    basis: Matrix,
    popularity: Matrix,
    items: np.ndarray,
    *,
    std: float,
    rank: int,
    rule: Rule = RULE,
) -> tuple[Matrix, np.ndarray]:
    """Eigenvectors [num_items + 1, <= rank] and positive eigenvalues of G, completed from its sketch.

    With C = sym(F' B) the completion is B F' + F (B - F C)': exact for what F spans, and zero where F sees nothing.
    Before that, rows of B are shrunk where noise outweighs what the item's count lets expect: in a large catalogue the
    noise of all the items that few took would hide the directions of the others. The rows of all other items are then
    estimated from those (`_all_rows`).

    Args:
        sketch: rows of B, [t, k].
        basis: F, orthonormal, [num_items + 1, k].
        popularity: released and positive, [num_items + 1].
        items: codes [t] of the rows.
        std: of the noise on the rows.
        rank: most eigenvectors.
        rule: how rows, estimates and eigenvalues are shrunk.
    """
    directions = basis.shape[1]
    kept = 1.0 / (1.0 + np.square(rule.half * std / popularity[items]))
    rest = _all_rows(sketch * kept[:, np.newaxis], basis, items, expected=rule.expected)
    inner = basis.T @ rest
    core = (inner + inner.T) / 2
    rest -= basis @ core
    # The completion is A M A' for A = [F, B - F C]. With A'A = U D U' its eigenvectors are A U D^(-1/2) times those of
    # a small matrix. To make A orthonormal instead would take most of the time and memory for a large catalogue.
    middle = np.block([[core, np.eye(directions)], [np.eye(directions), np.zeros_like(core)]])
    lengths, turned = np.linalg.eigh(np.block([[np.eye(directions), inner - core], [(inner - core).T, rest.T @ rest]]))
    spanned = lengths > _SMALLEST * lengths[-1]
    root, turned = np.sqrt(lengths[spanned]), turned[:, spanned]
    values, vectors = np.linalg.eigh(root[:, np.newaxis] * (turned.T @ middle @ turned) * root)
    leading = np.argsort(-values)[:rank]
    combined = (turned / root) @ vectors[:, leading]
    edge = std * (math.sqrt(float(np.square(kept).sum())) + math.sqrt(directions))
    found = basis @ combined[:directions] + rest @ combined[directions:]
    return _shrunk(found, values[leading], taken_off=rule.shrink * edge, rank=rank)


def _all_rows(rows: Matrix, basis: Matrix, items: np.ndarray, *, expected: float) -> Matrix:
    """`rows` [t, k] of `items`, and for each other item a part of what its public features let expect.

    What they let expect is F A, with the A that fits the rows of `items` best (least squares). An item of which the
    basis knows nothing gets zeros.
    """
    fitted = np.linalg.lstsq(basis[items], rows, rcond=_SMALLEST_FITTED)[0]
    found = expected * (basis @ fitted)
    found[items] = rows
    found[0] = 0.0
    return np.asarray(found)


def matrix_eigenvectors(matrix: Matrix, *, std: float, rank: int, rule: Rule = RULE) -> tuple[Matrix, np.ndarray]:
    """Eigenvectors [M, <= rank] and positive eigenvalues of a noised symmetric matrix, the largest first.

    Args:
        matrix: [M, M]; its diagonal means nothing and is overwritten.
        std: of the noise, as `noised_matrix` has it.
        rank: most eigenvectors.
        rule: how much is taken off the eigenvalues.
    """
    rank = min(rank, matrix.shape[0])
    edge = std * math.sqrt(2.0 * matrix.shape[0])
    for _ in range(_REFILLS):
        values, vectors = _leading(matrix, rank)
        np.fill_diagonal(matrix, np.square(vectors) @ np.maximum(values, 0.0))
    values, vectors = _leading(matrix, rank)
    return _shrunk(vectors, values, taken_off=rule.shrink * edge, rank=rank)


def above_noise(matrix: Matrix, spanned: Matrix, *, std: float, fewest: int, most: int) -> Matrix:
    """The leading eigenvectors [M, n] of what directions at hand do not span of a noised matrix.

    They are those beyond the noise's largest, within bounds. Directions that are in the basis already would take a part
    of the length of a history's direction, and say nothing new.

    Args:
        matrix: [M, M]; its diagonal means nothing and is overwritten.
        spanned: the directions at hand, at the M items, [M, k].
        std: of the noise, as `noised_matrix` has it.
        fewest: eigenvectors.
        most: eigenvectors.
    """
    most = min(most, matrix.shape[0])
    edge = std * math.sqrt(2.0 * matrix.shape[0])
    for _ in range(_REFILLS_OF_DIRECTIONS):
        values, vectors = _leading(matrix, most)
        beyond = values > edge
        np.fill_diagonal(matrix, np.square(vectors[:, beyond]) @ values[beyond])
    values, vectors = _leading(_without(matrix, spanned), most)
    return vectors[:, : max(fewest, int((values > edge).sum()))]


def _without(matrix: Matrix, spanned: Matrix) -> Matrix:
    """(I - P) matrix (I - P), where P projects on the columns of `spanned`."""
    if not spanned.shape[1]:
        return matrix
    q, _ = np.linalg.qr(spanned)
    rest = matrix - q @ (q.T @ matrix)
    return np.asarray(rest - (rest @ q) @ q.T)


def _leading(matrix: Matrix, number: int) -> tuple[np.ndarray, Matrix]:
    size = matrix.shape[0]
    values, vectors = eigh(matrix, subset_by_index=(size - number, size - 1))
    return values[::-1], np.asarray(vectors[:, ::-1])


def _shrunk(vectors: Matrix, values: np.ndarray, *, taken_off: float, rank: int) -> tuple[Matrix, np.ndarray]:
    order = np.argsort(-values)[:rank]
    left = values[order] - taken_off
    kept = left > 0.0
    return vectors[:, order[kept]], left[kept]


def item_vectors(
    vectors: Matrix,
    values: np.ndarray,
    popularity: Matrix,
    *,
    items: np.ndarray | None = None,
    dim: int,
    scale: float,
    power: float | None = None,
    rule: Rule = RULE,
) -> Matrix:
    """One vector an item, [num_items + 1, dim]; zero for the unknown item and for items of which nothing is known.

    Args:
        vectors: eigenvectors of G over `items` (all codes where None).
        values: their eigenvalues, positive.
        popularity: released and positive, [num_items + 1].
        items: codes.
        scale: typical (root mean square) dot product of the vectors of two items drawn by popularity.
        dim: columns; those beyond the number of eigenvectors are zero.
        power: of the popularity, by which vectors are divided; None for the rule's.
        rule: how eigenvalues and popularity weigh.
    """
    codes = np.arange(len(popularity)) if items is None else items
    found = np.zeros((len(popularity), dim))
    if values.size:
        weights = np.sqrt(values / (values + rule.ridge * values.max()))
        scaled = (
            vectors * weights / popularity[codes, np.newaxis] ** (rule.popularity_power if power is None else power)
        )
        share = popularity[codes] / popularity[codes].sum()
        typical = math.sqrt(float(np.square(scaled.T @ (share[:, np.newaxis] * scaled)).sum()))
        found[codes, : values.size] = scaled * math.sqrt(scale / typical) if typical > 0.0 else 0.0
    found[0] = 0.0
    return found
