"""Which of several versions answers a request: the same one for the same key, in given shares (A/B, canary)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

_DIGEST_BYTES = 8
_RANGE = 2.0 ** (8 * _DIGEST_BYTES)


class Split:
    """Rendezvous hashing with weights: every name draws a number for the key, and the least number answers.

    The number of a name is an exponential variable whose rate is the weight, made from a keyed hash of name and key,
    so a name has the least one with probability weight / sum of weights. It depends on no other name: where a weight
    changes, or a name comes or goes, keys move from or to that name alone, and no more of them than its share changes.
    (Weighted rendezvous hashing: Schindelhauer and Schomaker, SPAA 2005.)

    Attributes:
        names: that may answer.
    """

    def __init__(self, weights: Mapping[str, float], *, salt: str) -> None:
        """Split by `weights`; another `salt` deals the keys anew."""
        self.names = tuple(weights)
        self._weights = dict(weights)
        key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
        self._hashes = {
            name: hashlib.blake2b(name.encode() + b"\0", digest_size=_DIGEST_BYTES, key=key) for name in weights
        }
        self._heaviest = sorted(weights, key=lambda name: -weights[name])

    def choose(self, key: str | None, among: Collection[str]) -> str | None:
        """The name that answers `key`, of those that are `among` what is served; None where none is.

        Without a key it is the name with the greatest weight.
        """
        if key is None:
            return next((name for name in self._heaviest if name in among), None)
        encoded = key.encode()
        return min(
            (name for name in self.names if name in among), key=lambda name: self._draw(name, encoded), default=None
        )

    def _draw(self, name: str, key: bytes) -> float:
        hashed = self._hashes[name].copy()
        hashed.update(key)
        uniform = (int.from_bytes(hashed.digest(), "big") + 0.5) / _RANGE
        return -math.log(uniform) / self._weights[name]
