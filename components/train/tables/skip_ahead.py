"""The pending noise of a row: the skip-ahead table, exact for SGD with schedules, weight decay and momentum.

One step of SGD without a gradient is linear in the row's state s and in the step's noise z ~ N(0, I):

    s_t = A_t s_{t-1} + B_t (noise_scale z_t)                                    noise_scale = sigma C / b

With learning rate lr, weight decay wd and momentum mu, in the convention of `torch.optim.SGD`
(v_t = mu v_{t-1} + wd w_{t-1} + gradient; w_t = w_{t-1} - lr v_t):

    no momentum:  s = w         A = 1 - lr wd                                  B = -lr
    momentum:     s = (w, v)    A = [[1 - lr wd, -lr mu], [wd, mu]]            B = (-lr, 1)

A row that was last brought up to date at step h and is needed at step t has the distribution of M s + L z with one z,
where M = A_t ... A_{h+1} and L L' = S, and both follow from the step before by M <- A M, S <- A S A' + Q with
Q = B B' noise_scale^2. The table keeps (M, S) for every start h in float64 and hands float32 copies to the kernels.

A gradient that arrives at step t belongs beside the noise of step t, but that noise is still pending when the
gradient is applied. So it is applied as A_t^-1 B_t g, and the pending transition, whenever it comes, makes it B_t g:

    no momentum:  A^-1 B = -lr / (1 - lr wd)          momentum:  A^-1 B = (0, 1 / mu)

(for A (0, 1/mu) = (-lr, 1) = B). With momentum the gradient therefore only ever enters the velocity.

Adam, Adagrad and their kin divide by a running function of the gradients: a step is then not linear in the noise, the
sum over pending steps has no closed form, and no single draw catches a row up. They are refused for embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazydp.components.shared.errors import FormatError, InputError
from lazydp.components.train.device.placement import CPU, moved
from lazydp.kernels.arguments import Distribution

Schedule = Callable[[int], float]
"""Learning rate of step t = 1, 2, ...: a function of the step alone, so that it is known in advance and public."""

_FIRST_CAPACITY = 1024


@dataclass(frozen=True, slots=True)
class EmbeddingSgd:
    """The optimizer of the tables: SGD, in the convention of `torch.optim.SGD`.

    Attributes:
        learning_rate: rate (>= 0), or a schedule: step (1, 2, ...) -> rate.
        momentum: mu, in [0, 1).
        weight_decay: wd >= 0; `learning_rate * weight_decay` must stay below 1 where there is no momentum.

    Raises:
        InputError: a value outside its range.
    """

    learning_rate: Schedule | float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise InputError(f"momentum of the embedding optimizer must lie in [0, 1), found {self.momentum}")
        if not (0.0 <= self.weight_decay < math.inf):
            raise InputError(f"weight_decay of the embedding optimizer must be at least 0, found {self.weight_decay}")

    def rate(self, step: int) -> float:
        """Learning rate of `step`, checked.

        Raises:
            InputError: the schedule gave a negative or non-finite rate, or one that weight decay cannot follow.
        """
        rate = float(self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate)
        if not 0.0 <= rate < math.inf:
            raise InputError(f"learning rate of step {step} must be finite and at least 0, the schedule gave {rate}")
        if not self.momentum and rate * self.weight_decay >= 1.0:
            raise InputError(
                f"learning_rate * weight_decay must stay below 1, found {rate} * {self.weight_decay} at step {step}"
            )
        return rate


def refuse_nonlinear(name: str) -> None:
    """Accept `sgd` as the optimizer of tables, refuse everything else.

    Raises:
        InputError: says why an adaptive optimizer cannot be lazy.
    """
    if name.lower() != "sgd":
        raise InputError(
            f"embedding tables cannot be trained by {name!r}: delayed noise needs a step that is linear in the noise, "
            "and adaptive optimizers divide by a function of past noisy gradients; use sgd (with momentum, weight "
            "decay or a schedule) for embeddings and keep the adaptive optimizer for the dense layers"
        )


class SkipAhead:
    """Transition and noise factor from every start h = 0..step to the present step.

    Args:
        optimizer: the linear step.
        noise_scale: sigma C / b, the standard deviation of one step's noise on the averaged gradient.
        distribution: `gaussian`, or `ones`: every z is 1 and sums of noise add instead of their squares, so that tests
            can compare lazy with eager exactly.
        device: where the kernels want transition and factor; the recursion is float64 on the CPU everywhere.
    """

    def __init__(
        self,
        optimizer: EmbeddingSgd,
        *,
        noise_scale: float,
        distribution: Distribution = "gaussian",
        device: torch.device = CPU,
    ) -> None:
        self._optimizer = optimizer
        self._noise_scale = noise_scale
        self._distribution = distribution
        self._device = device
        self._sent: list[Tensor] | None = None
        self._process = _Momentum(optimizer) if optimizer.momentum else _Weight(optimizer)
        self.step = 0
        """The present step: what the table leads to."""
        size = self._process.dimension
        self._moments = torch.zeros(_FIRST_CAPACITY, self._process.num_moments, dtype=torch.float64)
        self._transition = torch.zeros(_FIRST_CAPACITY, size * size)
        self._factor = torch.zeros(_FIRST_CAPACITY, size * (size + 1) // 2)
        self._begin(0)

    @property
    def dimension(self) -> int:
        """1 (weight) or 2 (weight and velocity)."""
        return self._process.dimension

    @property
    def is_identity(self) -> bool:
        """Whether a row that is not read never changes: no noise, no weight decay, no momentum."""
        return self._noise_scale == 0.0 and not self._optimizer.momentum and not self._optimizer.weight_decay

    @property
    def longest_noise(self) -> float:
        """Standard deviation of the weight's noise, of a row that never had any."""
        variance = float(self._moments[0, self.dimension**2])
        return math.sqrt(variance) if self._distribution == "gaussian" else abs(variance)

    @property
    def transition(self) -> Tensor:
        """M, float32 [step + 1, 1 or 4] row-major; row h leads from step h to the present."""
        return self._for_kernels()[0]

    @property
    def exact_transition(self) -> Tensor:
        """M in float64."""
        size = self.dimension**2
        return moved([self._moments[: self.step + 1, :size]], self._device)[0]

    @property
    def factor(self) -> Tensor:
        """L, float32 [step + 1, 1 or 3]: the scale, or (l11, l21, l22) of the lower triangular factor."""
        return self._for_kernels()[1]

    def _for_kernels(self) -> list[Tensor]:
        """Transition and factor where the kernels want them: sent once a step, however many tables read them."""
        if self._sent is None:
            self._sent = moved([self._transition[: self.step + 1], self._factor[: self.step + 1]], self._device)
        return self._sent

    def advance(self) -> None:
        """Move the present one step ahead."""
        rate = self._optimizer.rate(self.step + 1)
        self._sent = None
        past = self._moments[: self.step + 1]
        self._process.advance(past, rate, self._noise_scale, self._distribution)
        self._process.write(past, self._transition[: self.step + 1], self._factor[: self.step + 1], self._distribution)
        self.step += 1
        if self.step == len(self._moments):
            self._moments = _doubled(self._moments)
            self._transition = _doubled(self._transition)
            self._factor = _doubled(self._factor)
        self._begin(self.step)

    def _begin(self, start: int) -> None:
        """A row that is up to date at `start` stays as it is."""
        self._moments[start] = torch.tensor(self._process.identity, dtype=torch.float64)
        here = slice(start, start + 1)
        self._process.write(self._moments[here], self._transition[here], self._factor[here], self._distribution)

    def gradient_scale(self) -> float:
        """What multiplies the averaged gradient of the coming step when it is added now (A^-1 B of the step ahead).

        It is added to the weight, or with momentum to the velocity.
        """
        return self._process.gradient_scale(self._optimizer.rate(self.step + 1))

    def state_dict(self) -> dict[str, Any]:
        """The table, for a checkpoint."""
        return {"step": self.step, "dimension": self.dimension, "moments": self._moments[: self.step + 1].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            FormatError: the state is of another optimizer or torn.
        """
        moments = state["moments"]
        if state["dimension"] != self.dimension or moments.shape != (state["step"] + 1, self._process.num_moments):
            raise FormatError(
                f"the checkpoint's skip-ahead table is of dimension {state['dimension']} and shape "
                f"{tuple(moments.shape)}, this run needs dimension {self.dimension}: it belongs to another optimizer"
            )
        self._sent = None
        self.step = int(state["step"])
        while len(self._moments) <= self.step:
            self._moments = _doubled(self._moments)
            self._transition = _doubled(self._transition)
            self._factor = _doubled(self._factor)
        past = slice(self.step + 1)
        self._moments[past] = moments
        self._process.write(self._moments[past], self._transition[past], self._factor[past], self._distribution)


def _doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.zeros_like(tensor)])


class _Weight:
    """s = w. Moments: M and the variance S (or, where every z is 1, the sum)."""

    dimension = 1
    num_moments = 2
    identity = (1.0, 0.0)

    def __init__(self, optimizer: EmbeddingSgd) -> None:
        self._decay = optimizer.weight_decay

    def advance(self, moments: Tensor, rate: float, noise_scale: float, distribution: Distribution) -> None:
        a = 1.0 - rate * self._decay
        transition, spread = moments[:, 0], moments[:, 1]
        if a != 1.0:
            transition *= a
            spread *= a * a if distribution == "gaussian" else a
        spread += (rate * noise_scale) ** 2 if distribution == "gaussian" else rate * noise_scale

    def write(self, moments: Tensor, transition: Tensor, factor: Tensor, distribution: Distribution) -> None:
        transition[:, 0] = moments[:, 0]
        spread = moments[:, 1]
        # Noise moves against the gradient's sign, as the gradient does.
        factor[:, 0] = -(spread.sqrt() if distribution == "gaussian" else spread)

    def gradient_scale(self, rate: float) -> float:
        return -rate / (1.0 - rate * self._decay)


class _Momentum:
    """s = (w, v). Moments: M row-major, then (S11, S21, S22), or where every z is 1 (m1, m2, unused)."""

    dimension = 2
    num_moments = 7
    identity = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)

    def __init__(self, optimizer: EmbeddingSgd) -> None:
        self._decay = optimizer.weight_decay
        self._momentum = optimizer.momentum

    def advance(self, moments: Tensor, rate: float, noise_scale: float, distribution: Distribution) -> None:
        a = torch.tensor(
            [[1.0 - rate * self._decay, -rate * self._momentum], [self._decay, self._momentum]], dtype=torch.float64
        )
        b = torch.tensor([-rate, 1.0], dtype=torch.float64) * noise_scale
        moments[:, :4] = (a @ moments[:, :4].view(-1, 2, 2)).view(-1, 4)
        if distribution == "ones":
            moments[:, 4:6] = moments[:, 4:6] @ a.T + b
            return
        s11, s21, s22 = moments[:, 4], moments[:, 5], moments[:, 6]
        (a11, a12), (a21, a22) = a.tolist()
        b1, b2 = b.tolist()
        new11 = a11 * a11 * s11 + 2 * a11 * a12 * s21 + a12 * a12 * s22 + b1 * b1
        new21 = a11 * a21 * s11 + (a11 * a22 + a12 * a21) * s21 + a12 * a22 * s22 + b1 * b2
        new22 = a21 * a21 * s11 + 2 * a21 * a22 * s21 + a22 * a22 * s22 + b2 * b2
        moments[:, 4], moments[:, 5], moments[:, 6] = new11, new21, new22

    def write(self, moments: Tensor, transition: Tensor, factor: Tensor, distribution: Distribution) -> None:
        transition.copy_(moments[:, :4])
        if distribution == "ones":
            factor[:, 0] = moments[:, 4]
            factor[:, 1] = moments[:, 5]
            factor[:, 2] = 0.0
            return
        l11 = moments[:, 4].sqrt()
        # l11 = 0 means that the weight has no noise yet (all rates were 0); then the covariance is 0 as well.
        l21 = torch.where(l11 > 0, moments[:, 5] / l11, 0.0)
        factor[:, 0] = l11
        factor[:, 1] = l21
        factor[:, 2] = (moments[:, 6] - l21 * l21).clamp(min=0.0).sqrt()

    def gradient_scale(self, rate: float) -> float:
        del rate  # it enters by the pending transition
        return 1.0 / self._momentum
