"""In what order the units of a step are added up, and in blocks of how many: so that one more hardly moves the rest.

A sum of float32 terms is rounded as it grows, and a unit that comes first moves all others to other places. So units
are added up in a random order, in blocks of n (`kernels.products.weighted_product_`). One more unit then is in a block
with n - 1 others, at the place of one that goes to the end, and changes the rounding in that block alone
(docs/floating-point.md has the proof). What it changes is at most `ROUNDING` of C, which the clipping leaves free.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lazydp.kernels.noise_key import NoiseKey
from lazydp.kernels.ops import SimdLevel, chacha_words, simd_level
from lazydp.kernels.products import MAX_BLOCK, moved_rounding

ROUNDING = 2.0**-12
"""What one unit may change in the rounding of the others' terms, relative to C."""

_UNIT = 2.0**-24  # what a float32 operation rounds, relative
_WORDS_PER_BLOCK = 16
_WORDS_PER_UNIT = 2
# Blocks of a keystream that one lane may draw: for more units than a step may have.
_BLOCKS_PER_LANE = 1 << 23
MAX_LANES = (1 << 32) // _BLOCKS_PER_LANE


class UnitOrder:
    """The order of the units of each step.

    Args:
        key: noise key; the order of step t is keystream t of it, which draws no noise. None: units are added as they
            lie, and the bound does not hold.
    """

    def __init__(self, key: NoiseKey | None) -> None:
        self._key = key
        self.begin(0, exchanges=1)

    def draw_under(self, key: NoiseKey) -> None:
        """Draw under `key` from now on."""
        self._key = key

    def begin(self, step: int, *, exchanges: int) -> None:
        """Begin step number `step`.

        Args:
            step: 0 <= step.
            exchanges: in how many places, over all micro-batches, one more unit can put another unit than without it.
        """
        self.block = block_size(exchanges)
        self._step = step
        self._next = 0

    def begin_lane(self, lane: int) -> None:
        """The next micro-batches are those of `lane`, which has a part of the keystream to itself."""
        self._next = lane * _BLOCKS_PER_LANE

    def of(self, units: int) -> Tensor | None:
        """The order of the next micro-batch: a uniformly random permutation, int64 [U], new for each call of a step."""
        if self._key is None:
            return None
        words = _WORDS_PER_UNIT * units
        while True:
            drawn = chacha_words(self._key.tensor(), stream=self._step, counter=self._next, n=words)
            self._next += -(-words // _WORDS_PER_BLOCK)
            ranked, order = drawn.view(torch.int64).sort()
            if not bool((ranked[1:] == ranked[:-1]).any()):  # else the permutation would not be uniform
                return order


def block_size(exchanges: int) -> int:
    """The largest block for which `exchanges` places that hold another unit change at most ROUNDING of C in all.

    It depends on the order in which the processor adds a block (`kernels.products.moved_rounding`). In blocks of one
    unit nothing changes.
    """
    return _largest_block(max(1, exchanges), simd_level())


@functools.cache
def _largest_block(exchanges: int, level: SimdLevel) -> int:
    del level  # in use; a part of the cache's key
    allowed = ROUNDING / _UNIT / exchanges
    return next((block for block in range(MAX_BLOCK, 1, -1) if moved_rounding(block) <= allowed), 1)
