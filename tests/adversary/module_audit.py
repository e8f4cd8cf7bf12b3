"""An audit of `make_private` on a model of one's own: canaries in single steps of one run, and what the weights show.

`lazydp audit` gives each canary a row of its own. Here a canary is an ordinary example of the model with a loss
thirty times too large, so that its clipped gradient lies in every parameter of the model, dense layers and shared
tables.

A round is two steps and a flush: an empty draw, whose noise is then pending on every row, and a batch of examples that
the adversary knows, with the round's canary if its coin says so. The adversary sees the weights before and after the
round. A plain copy of the model gives it the gradients of all examples by autograd, so that nothing but the coin and
the noise of two steps is unknown. A canary takes part in one step: what the run claims for it is one Gaussian
mechanism, of noise multiplier sqrt(2) sigma for whoever sees the weights of every second step.

Under the claim no guess about a fair coin is right with a probability above Phi(mu / 2), mu = 1 / multiplier, whatever
the rounds before showed. So the number of right guesses is at most binomial, and more of them refute the claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from lazydp.components.audit.guesses import Coins
from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import PrivateTrainer, make_private
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey
from support.public_models import Batch, PublicModel, built, gradient_of_one, norm_of

DELTA = 1e-5
SEEN = 0.5
"""Noise multiplier of a round."""
OTHERS = 4
"""Examples in each batch beside the canary, and the fixed divisor."""
_SIGMA = SEEN / math.sqrt(2)
_NORM, _RATE = 0.3, 1e-3
_EXCESS, _QUIET = 30.0, 0.02
"""What losses of canaries and of others are multiplied by: others are hardly clipped, whatever the code does."""


@dataclass(frozen=True, slots=True)
class ModuleAudit:
    """What an audit found.

    Attributes:
        epsilon_claimed: at delta 1e-5, for a canary.
        epsilon_lower_bound: by the guesses, at the audit's confidence.
        correct: right guesses.
        canaries: coins, all of them guessed.
        noise: for each parameter the variance of its noise over the promised one, and the number of values behind it.
    """

    epsilon_claimed: float
    epsilon_lower_bound: float
    correct: int
    canaries: int
    noise: Mapping[str, tuple[float, int]]

    @property
    def refutes_the_claim(self) -> bool:
        """Whether the guesses contradict what the run claims."""
        return self.epsilon_lower_bound >= self.epsilon_claimed

    @property
    def wrong_noise(self) -> set[str]:
        """Parameters whose noise is not the promised one, by five standard deviations of its measured variance.

        What a canary adds beyond its clipped gradient is in this noise, too.
        """
        return {name for name, (ratio, values) in self.noise.items() if abs(ratio - 1) > 5 * math.sqrt(2 / values)}

    @property
    def contradicts(self) -> bool:
        """Whether anything found contradicts what the run promises."""
        return self.refutes_the_claim or bool(self.wrong_noise)


def audit(public: PublicModel, *, canaries: int, error: float) -> ModuleAudit:
    """Train the model with canaries and guess their coins.

    Args:
        public: the model and its batches.
        canaries: how many, and so rounds.
        error: probability that the bound lies above the truth.
    """
    generator = torch.Generator().manual_seed(int(torch.seed() % 2**31))
    coins = torch.randint(0, 2, (canaries,), generator=generator).bool().numpy()
    game = _Game(public, generator)
    guesses = np.array([game.round(is_in) for is_in in coins])
    return _judged(guesses, coins, game.noise(), error)


def _judged(guesses: Coins, coins: Coins, noise: Mapping[str, tuple[float, int]], error: float) -> ModuleAudit:
    correct = int((guesses == coins).sum())
    # Clopper and Pearson 1934; below one half it says nothing.
    rate = max(0.5, float(beta.ppf(error, correct, len(coins) - correct + 1)))
    mu = 2 * float(norm.ppf(rate))
    return ModuleAudit(_epsilon(1 / SEEN), _epsilon(mu), correct, len(coins), noise)


def _epsilon(mu: float) -> float:
    """Of N(0, 1) against N(mu, 1)."""
    if not mu:
        return 0.0
    return epsilon(dpsgd_event(noise_multiplier=1 / mu, sampling_prob=1.0, steps=1), delta=DELTA)


class _Game:
    """The run, and the adversary's copy of the model."""

    def __init__(self, public: PublicModel, generator: torch.Generator) -> None:
        self._public = public
        self._generator = generator
        self._plain = built(public, dropout=False)
        self._model = built(public, dropout=False)
        self._trainer = _trainer_of(self._model)
        self._squares: dict[str, float] = {}
        self._values: dict[str, int] = {}

    def round(self, is_in: bool) -> bool:
        """One round; whether the canary seems to be in: the weights went along its gradient, others' taken off."""
        inputs = self._public.inputs(OTHERS + 1, self._generator)
        self._plain.load_state_dict(self._model.state_dict())
        *others, canary = (gradient_of_one(self._plain, self._public, inputs, i) for i in range(OTHERS + 1))
        canary = {name: part * _EXCESS for name, part in canary.items()}
        others = [{name: part * _QUIET for name, part in gradient.items()} for gradient in others]
        before = self._weights()
        self._trainer.step()
        self._step(inputs if is_in else _without_last(inputs), is_in)
        self._trainer.flush()
        after = self._weights()
        moved = {name: (before[name] - after[name]) * OTHERS / _RATE for name in before}
        for gradient in others:
            _subtract(moved, _clipped(gradient))
        clipped = _clipped(canary)
        score = sum(float((moved[name] * part.double()).sum()) for name, part in clipped.items())
        if is_in:
            _subtract(moved, clipped)
        self._measure(moved)
        return score > norm_of(clipped) ** 2 / 2

    def noise(self) -> dict[str, tuple[float, int]]:
        """Measured over promised variance of each parameter's noise, and the number of values."""
        promised = (SEEN * _NORM) ** 2
        return {name: (self._squares[name] / (n * promised), n) for name, n in self._values.items()}

    def _step(self, inputs: Batch, with_canary: bool) -> None:
        factor = torch.full((inputs[0].shape[0],), _QUIET)
        if with_canary:
            factor[-1] = _EXCESS
        self._trainer.step(lambda: self._public.losses(self._model(*inputs), inputs) * factor)

    def _weights(self) -> dict[str, Tensor]:
        state = self._model.state_dict()
        return {name: state[name].double() for name, _ in self._plain.named_parameters()}

    def _measure(self, noise: Mapping[str, Tensor]) -> None:
        constant = _constant_rows(self._plain)
        for name, values in noise.items():
            free = values
            if name in constant:
                free = torch.cat([values[: constant[name]], values[constant[name] + 1 :]])
                assert not values[constant[name]].any()
            self._squares[name] = self._squares.get(name, 0.0) + float(free.square().sum())
            self._values[name] = self._values.get(name, 0) + free.numel()


def _trainer_of(model: nn.Module) -> PrivateTrainer:
    return make_private(
        model,
        privacy=PrivacyParameters(noise_multiplier=_SIGMA, max_grad_norm=_NORM, expected_batch_size=float(OTHERS)),
        embeddings=EmbeddingSgd(_RATE),
        dense=DenseOptimizer.named("sgd", learning_rate=_RATE),
        key=NoiseKey.generate(),
    )


def _constant_rows(model: nn.Module) -> dict[str, int]:
    """The padding row of each table that has one."""
    return {
        f"{name}.weight": module.padding_idx
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None
    }


def _without_last(inputs: Batch) -> Batch:
    return tuple(tensor[:-1] for tensor in inputs)


def _clipped(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    factor = _NORM / max(_NORM, norm_of(gradient))
    return {name: part * factor for name, part in gradient.items()}


def _subtract(total: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    for name, part in terms.items():
        total[name] = total[name] - part.double()
