"""The mechanism of one step: what is clipped, to which norms, and how much noise that asks for.

A privacy unit's gradient g has two groups of coordinates: the dense layers' g_D and the embedding tables' g_E. Clipped
with one norm C, the unit moves the sum by at most C in all coordinates together, and noise of standard deviation
sigma C everywhere makes a step the Gaussian mechanism of noise multiplier sigma.

**One norm for each group.** With max_grad_norm {dense: C_D, embeddings: C_E} each group is clipped by itself, and
group j of m = 2 gets noise of standard deviation s_j = sigma sqrt(m) C_j. Divide the coordinates of each group by its
s_j: the noise becomes N(0, I), and adding or removing a unit moves the sum by at most

    sqrt( sum_j (C_j / s_j)^2 ) = sqrt( m / (m sigma^2) ) = 1 / sigma,

so that the step is the same Gaussian mechanism of noise multiplier sigma, whatever the norms are. The division is
public and can be undone, hence costs nothing. Several contributions of one unit (j examples of a user, where examples
are sampled) move it by at most j / sigma: the mixture that accounts for them is the same too. Noise in proportion to
each group's own norm keeps the groups apart: a norm that is small because its gradients are small is not drowned in
the noise of the other one, as it would be with one noise for both. The price is the factor sqrt(2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lazydp.components.shared.errors import InputError

Group = Literal["dense", "embeddings"]
"""A group of parameters."""
GROUPS: tuple[Group, ...] = ("dense", "embeddings")

SMALLEST_NORM, LARGEST_NORM = 1e-10, 1e10
"""Between which C lies."""

UserGradient = Literal["sum", "mean"]
"""What is clipped where users are sampled: the sum, or the mean, of the gradients of the user's examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNorms:
    """C for each group of parameters.

    Raises:
        InputError: a norm outside [1e-10, 1e10].
    """

    dense: float
    embeddings: float

    def __post_init__(self) -> None:
        for group in GROUPS:
            _check_norm(f"max_grad_norm of {group}", self.of(group))

    def of(self, group: Group) -> float:
        """C of one group."""
        return self.dense if group == "dense" else self.embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyParameters:
    """What the mechanism of a step is made of; all of it public, none of it derived from the dataset.

    Attributes:
        noise_multiplier: sigma, >= 0; 0 gives no privacy and exists for tests.
        max_grad_norm: C in [1e-10, 1e10], or one for each group; infinity (no clipping) only with noise_multiplier 0.
        expected_batch_size: b > 0, the fixed divisor, in privacy units; never the number that a step happened to draw.
        user_gradient: None where each example is clipped; else what is clipped of each user.

    Raises:
        InputError: a value outside its range.
    """

    noise_multiplier: float
    max_grad_norm: float | GroupNorms
    expected_batch_size: float
    user_gradient: UserGradient | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise InputError(f"noise_multiplier must be finite and at least 0, found {self.noise_multiplier}")
        if not isinstance(self.max_grad_norm, GroupNorms):
            if self.max_grad_norm != math.inf:
                _check_norm("max_grad_norm", self.max_grad_norm)
            if self.noise_multiplier and math.isinf(self.max_grad_norm):
                raise InputError("noise without clipping protects nobody: give a finite max_grad_norm")
        if not 0.0 < self.expected_batch_size < math.inf:
            raise InputError(f"expected_batch_size must be finite and above 0, found {self.expected_batch_size}")
        if self.user_gradient not in (None, "sum", "mean"):
            raise InputError(f"user_gradient must be sum or mean, found {self.user_gradient!r}")

    def bound(self, group: Group) -> float | None:
        """C / b, what one unit adds to the averaged gradients of a group at most; None where nothing is clipped."""
        norms = self.max_grad_norm
        norm = norms.of(group) if isinstance(norms, GroupNorms) else norms
        return None if math.isinf(norm) else norm / self.expected_batch_size

    def noise_std(self, group: Group) -> float:
        """Standard deviation of the noise on each coordinate of a group's clipped sum; the module argues for it."""
        if not self.noise_multiplier:
            return 0.0
        if isinstance(self.max_grad_norm, GroupNorms):
            return self.noise_multiplier * math.sqrt(len(GROUPS)) * self.max_grad_norm.of(group)
        return self.noise_multiplier * self.max_grad_norm

    def noise_scale(self, group: Group) -> float:
        """The same on the averaged gradient: `noise_std` over the expected batch size."""
        return self.noise_std(group) / self.expected_batch_size


def _check_norm(name: str, norm: float) -> None:
    if not SMALLEST_NORM <= norm <= LARGEST_NORM:
        raise InputError(
            f"{name} must lie in [{SMALLEST_NORM:g}, {LARGEST_NORM:g}], where clipped gradients are normal float32 "
            f"numbers; found {norm}"
        )
