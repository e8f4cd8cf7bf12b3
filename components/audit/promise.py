"""What a run promises about the noise on a row, worked out apart from the code that adds it."""

from __future__ import annotations

import math

import numpy as np

from lazydp.components.train.tables.skip_ahead import EmbeddingSgd


def promised_std(optimizer: EmbeddingSgd, *, noise_scale: float, steps: int) -> float:
    """Standard deviation of the noise in one weight of a table after `steps` steps, whatever rows were read.

    The eager recursion for weight and velocity under `torch.optim.SGD`, v = mu v + wd w + noise and w = w - lr v, with
    noise of standard deviation `noise_scale` (sigma C / b) at every step.
    """
    covariance = np.zeros((2, 2))
    decay, momentum = optimizer.weight_decay, optimizer.momentum
    for step in range(1, steps + 1):
        rate = optimizer.rate(step)
        transition = np.array([[1.0 - rate * decay, -rate * momentum], [decay, momentum]])
        noise = noise_scale * np.array([-rate, 1.0])
        covariance = transition @ covariance @ transition.T + np.outer(noise, noise)
    return math.sqrt(covariance[0, 0])


def promised_separation(*, noise_multiplier: float, sampling_prob: float, steps: int, examples_each: int) -> float:
    """How far a canary's gradients move its row, as promised, in standard deviations of the row's noise.

    At a constant learning rate and without weight decay or momentum; otherwise about this. It decides how many coins
    are guessed and nothing else, so that a wrong figure weakens the audit and never its truth.
    """
    return examples_each * sampling_prob * math.sqrt(steps) / noise_multiplier
