"""Poisson sampling of examples or users, and uniform sampling of negatives, from the secure stream.

A step holds each example (or each user, with all examples) independently with probability q. Drawing a coin an
example would cost as much as the dataset is long; the same distribution costs what the batch is long when the size
M ~ Binomial(N, q) is drawn first and then a uniform subset of M members: given its size, a Poisson sample is a uniform
subset.

Both draws are pure functions of (key, step): nothing is carried from step to step, so a resumed run, or another
process, draws the same batch. Exactness:

* the size is drawn by inversion of the binomial's distribution function in integer arithmetic of 256 bits against a
  128-bit uniform integer: its distribution is within 2**-96 of the binomial in total variation;
* the members are drawn by rejection from 64-bit integers, without rounding: given the size they are exactly uniform.

So a run of T steps is within T * 2**-96 of ideal Poisson sampling in total variation, which adds at most
(1 + e**epsilon) * T * 2**-96 to delta: nothing against any delta in use.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from lazydp.components.shared.errors import InputError
from lazydp.kernels.noise_key import NoiseKey
from lazydp.kernels.ops import chacha_words

if TYPE_CHECKING:
    from dp_accounting import DpEvent

SAMPLER = "poisson"
"""Name of the distribution of the batches, as the accounting knows it."""

Sampled = Literal["example", "user"]
"""What a step draws."""

_UNIFORM_BITS = 128
_FIXED_POINT_BITS = 256
# Weights below 2**-_TAIL_BITS of the mode's are dropped: what lies beyond is below 2**-100 for every N < 2**60.
_TAIL_BITS = 160


class Keystream:
    """Uniform 64-bit integers of one (key, stream), in order.

    Args:
        key: the key of this purpose; two purposes never share one.
        stream: which stream of the key, for example the step.
    """

    def __init__(self, key: NoiseKey, *, stream: int) -> None:
        self._key = key
        self._stream = stream
        self._block = 0

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The next `count` integers, uniform over 0..2**64-1. What is left of the last block is thrown away."""
        blocks = -(-count // 8)  # a ChaCha20 block is 64 bytes
        raw = chacha_words(self._key.tensor(), stream=self._stream, counter=self._block, n=16 * blocks)
        self._block += blocks
        words: npt.NDArray[np.uint64] = raw.numpy().view(np.uint64)[:count]
        return words

    def below(self, bound: int, count: int) -> npt.NDArray[np.int64]:
        """`count` integers, exactly uniform over 0..bound-1 (1 <= bound < 2**63), by rejection."""
        excess = (1 << 64) % bound
        drawn = self.words(count)
        if excess:
            # The top `excess` integers would favour small remainders.
            limit = np.uint64((1 << 64) - excess)
            drawn = drawn[drawn < limit]
            while drawn.size < count:
                more = self.words(max(count - drawn.size, 8))
                drawn = np.concatenate([drawn, more[more < limit]])[:count]
        return (drawn % np.uint64(bound)).astype(np.int64)


class Binomial:
    """Binomial(trials, probability), drawn by inversion in integers.

    Args:
        trials: N >= 0.
        probability: q in (0, 1], taken as the exact rational that the float is.
    """

    def __init__(self, trials: int, probability: float) -> None:
        numerator, denominator = probability.as_integer_ratio()
        failure = denominator - numerator
        mode = min(trials, (trials + 1) * numerator // denominator)
        one = 1 << _FIXED_POINT_BITS
        smallest = one >> _TAIL_BITS

        above = []  # weights of mode, mode+1, ... by p(k+1)/p(k) = (N-k)/(k+1) * q/(1-q)
        weight, k = one, mode
        while weight > smallest:
            above.append(weight)
            if k == trials:
                break
            weight = weight * (trials - k) * numerator // ((k + 1) * failure)
            k += 1
        below = []  # weights of mode-1, mode-2, ... by the same ratio, backwards
        weight, k = one, mode
        while k > 0:
            weight = weight * k * failure // ((trials - k + 1) * numerator)
            if weight <= smallest:
                break
            k -= 1
            below.append(weight)

        self._first = mode - len(below)
        self._thresholds: list[int] = []
        weights = below[::-1] + above
        total, running = sum(weights), 0
        for weight in weights:
            running += weight
            self._thresholds.append((running << _UNIFORM_BITS) // total)

    def draw(self, stream: Keystream) -> int:
        """One draw; reads two words of the stream."""
        high, low = stream.words(2).tolist()
        return self._first + bisect.bisect_right(self._thresholds, (high << 64) | low)


def uniform_subset(stream: Keystream, population: int, size: int) -> npt.NDArray[np.int64]:
    """A uniformly chosen subset of `size` of 0..population-1, ascending.

    Draws one after another and skips what was drawn before; the larger half is drawn as the complement of the smaller.
    """
    if 2 * size > population:
        left_out = uniform_subset(stream, population, population - size)
        kept = np.ones(population, dtype=bool)
        kept[left_out] = False
        return np.flatnonzero(kept)
    drawn = stream.below(population, size) if size else np.empty(0, dtype=np.int64)
    while True:
        members, first_seen = np.unique(drawn, return_index=True)
        if members.size >= size:
            break
        drawn = np.concatenate([drawn, stream.below(population, max(size - members.size, 8))])
    if members.size > size:
        members = np.sort(members[np.argsort(first_seen)[:size]])
    return members


class PoissonSampler:
    """Poisson sampling over 0..population-1.

    Args:
        key: the run's key; the sampler draws under a key derived from it.
        population: how many examples (or users) there are, N. Private, unlike q.
        sampling_prob: q, a public setting.
        sampled: what is drawn.

    Raises:
        InputError: a population that is no whole number of at least 0, or a sampling_prob outside (0, 1].
    """

    def __init__(self, key: NoiseKey, *, population: int, sampling_prob: float, sampled: Sampled = "example") -> None:
        if isinstance(population, bool) or not isinstance(population, int | np.integer) or population < 0:
            raise InputError(f"population must be a whole number of at least 0, found {population!r}")
        if not 0 < sampling_prob <= 1:
            raise InputError(f"sampling_prob must be in (0, 1], found {sampling_prob}")
        self._key = key.derive("sampling")
        self._population = int(population)
        self._sampling_prob = sampling_prob
        self._sampled: Sampled = sampled
        self._size = Binomial(self._population, sampling_prob)

    @property
    def population(self) -> int:
        """N."""
        return self._population

    def members(self, step: int) -> npt.NDArray[np.int64]:
        """What step `step` (1, 2, ...) draws, ascending; possibly none. A pure function of (key, step).

        Raises:
            InputError: steps count from 1.
        """
        if step < 1:
            raise InputError(f"steps count from 1, found step {step}")
        stream = Keystream(self._key, stream=step)
        return uniform_subset(stream, self._population, self._size.draw(stream))

    def destroy(self) -> None:
        """Forget the key: nobody can tell afterwards what a step drew."""
        self._key.destroy()

    def dp_event(self, *, noise_multiplier: float, steps: int, max_examples_per_user: int | None = None) -> DpEvent:
        """What `steps` steps of a Gaussian mechanism on this sampler's batches are, for the accountant."""
        return poisson_dp_event(
            noise_multiplier=noise_multiplier,
            sampling_prob=self._sampling_prob,
            steps=steps,
            max_examples_per_user=max_examples_per_user,
            sampled=self._sampled,
        )


def sampler_name(sampled: Sampled) -> str:
    """The sampler as the privacy statement names it."""
    return SAMPLER if sampled == "example" else f"{SAMPLER} over users"


def poisson_dp_event(
    *,
    noise_multiplier: float,
    sampling_prob: float,
    steps: int,
    max_examples_per_user: int | None,
    sampled: Sampled = "example",
) -> DpEvent:
    """The event of Poisson-sampled DP-SGD, needed before a dataset (hence a sampler) is at hand.

    Args:
        noise_multiplier: standard deviation of the noise over `max_grad_norm`.
        sampling_prob: q of each example, or of each user.
        steps: how many steps were, or will be, taken.
        max_examples_per_user: None when an example is the privacy unit; else the bound k when a user is.
        sampled: what a step draws. A user who is drawn, with however many examples, contributes one clipped gradient:
            then a step is the plain sampled Gaussian per user, and k has no part in it.
    """
    from lazydp.components.budget.accounting.events import dpsgd_event, user_level_event  # noqa: PLC0415 - slow to import

    if max_examples_per_user is None or sampled == "user":
        return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps, sampler=SAMPLER)
    return user_level_event(
        noise_multiplier=noise_multiplier,
        sampling_prob=sampling_prob,
        steps=steps,
        max_examples_per_user=max_examples_per_user,
    )


class NegativeSampler:
    """Uniform negatives over the catalogue: independent of the data, so they cost no privacy.

    Args:
        key: the run's key; negatives are drawn under a key derived from it.
        num_items: codes run from 1 to num_items.
        negatives: how many an example gets.
    """

    def __init__(self, key: NoiseKey, *, num_items: int, negatives: int) -> None:
        self._key = key.derive("negatives")
        self._num_items = num_items
        self._negatives = negatives

    def draw(self, step: int, examples: int) -> npt.NDArray[np.int64]:
        """Item codes [examples, negatives] of step `step`. A pure function of (key, step, examples)."""
        stream = Keystream(self._key, stream=step)
        return 1 + stream.below(self._num_items, examples * self._negatives).reshape(examples, self._negatives)
