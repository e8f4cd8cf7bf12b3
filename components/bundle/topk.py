"""Exact top-k of scores: best first, ties by the smaller code, so that pages never overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

Scores: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
ScoreRows: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Codes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

# Below every score but that of an excluded entry, which is minus infinity.
_LEAST = np.finfo(np.float32).min
# Members of a group at most, and groups for each wanted entry below which the floor would let too many through.
_GROUP = 32
_LEAST_GROUPS = 4


def top_k_rows(scores: ScoreRows, k: int) -> list[Codes]:
    """For each row of `scores` [B, n] the indices of its `k` best, best first; ties by the smaller index.

    Entries of minus infinity are excluded, so fewer than k may come back. All rows together, because a call of numpy
    costs as much as its work on a row of some thousand scores.
    """
    rows, n = scores.shape
    # Comparing with a floor is faster than selecting positions, and keeps every tie at the edge.
    flat = np.flatnonzero(scores >= np.maximum(_floors(scores, k), _LEAST)[:, np.newaxis])
    descending = -scores.reshape(-1)[flat]
    found = []
    start = 0
    for row, end in enumerate(np.searchsorted(flat, np.arange(1, rows + 1) * n).tolist()):
        # Indices of a row ascend, so a stable sort leaves ties in the order of their index.
        order = descending[start:end].argsort(kind="stable")[:k]
        found.append(flat[start:end][order] - row * n)
        start = end
    return found


def top_k(scores: Scores, k: int) -> Codes:
    """`top_k_rows` of the one row `scores` [n]."""
    return top_k_rows(scores[np.newaxis], k)[0]


def _floors(scores: ScoreRows, k: int) -> Scores:
    """For each row of `scores` [B, n] a value that at least `k` of it reach, and not many more; [B].

    For many scores it is the k-th greatest of the maxima of groups: k groups hold an entry that reaches it. Taking
    maxima streams through memory, where selecting among all scores is several times slower.
    """
    rows, n = scores.shape
    if k >= n:
        return np.full(rows, _LEAST)
    members = min(_GROUP, n // (_LEAST_GROUPS * k))
    if members > 1:
        groups = n // members
        scores = scores[:, : groups * members].reshape(rows, members, groups).max(axis=1)
    position = scores.shape[1] - k
    floors: Scores = np.partition(scores, position, axis=1)[:, position]
    return floors


def in_order(scores: Scores) -> Iterator[int]:
    """Indices of every entry that is not excluded, best first, found in growing portions."""
    given, wanted = 0, 256
    while True:
        found = top_k(scores, wanted)
        yield from (int(index) for index in found[given:])
        if found.shape[0] < wanted:
            return
        given, wanted = found.shape[0], wanted * 4
