"""What a run costs, as a `DpEvent`: the one way from a configuration to what the ledger reserves and charges.

The event follows from public settings alone, so that it is known before there is a dataset to sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from dp_accounting import DpEvent

from lazydp.components.budget.accounting.epsilon import calibrate_noise_multiplier, epsilon
from lazydp.components.budget.accounting.events import composed, counts_event, start_event, without_amplification
from lazydp.components.budget.accounting.tuning import Tuning
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.sampler import poisson_dp_event
from lazydp.components.train.run.identity import RunIdentity


@dataclass(frozen=True, slots=True)
class RunCost:
    """The events of one run, per privacy unit unless a method says otherwise.

    `steps` is everywhere the number of steps done, where it is not the configured one.

    Attributes:
        config: of the run.
        max_examples_per_user: k, to which ingest bounded every user; needed for the unit `user`.
        noise_multiplier: sigma; None for the configured one.
        tuning: the sweep that the run is a trial of.
    """

    config: TrainConfig
    max_examples_per_user: int | None
    noise_multiplier: float | None = None
    tuning: Tuning | None = None

    @classmethod
    def of(cls, identity: RunIdentity, max_examples_per_user: int | None) -> Self:
        """The cost of a run that has begun."""
        return cls(identity.config, max_examples_per_user, identity.noise_multiplier, identity.tuning)

    def of_training(self, *, steps: int | None = None) -> DpEvent:
        """Training alone, without the counts: what the sampler draws for."""
        if self._steps(steps) and self.config.privacy_unit == "user" and self.max_examples_per_user is None:
            raise ValueError("max_examples_per_user: the unit `user` needs a bound on a user's examples")
        return self._sampled(self.max_examples_per_user if self.config.privacy_unit == "user" else None, steps)

    def of_run(self, *, steps: int | None = None) -> DpEvent:
        """Training, the counts where the run releases any, and the check of quality where it has one.

        The counts are in it whatever the step: the first snapshot releases them, and later ones release the same bits.
        """
        return self._judged(self._with_counts(self.of_training(steps=steps)))

    def of_release(self, *, steps: int | None = None) -> DpEvent:
        """What a release is charged: the run, or the whole sweep that selected it."""
        return self._selected(self.of_run(steps=steps))

    def of_release_without_counts(self, *, steps: int | None = None) -> DpEvent:
        """What a release would be charged if it held no counts."""
        return self._selected(self._judged(self.of_training(steps=steps)))

    def of_known_batches(self, *, steps: int | None = None) -> DpEvent:
        """What a release would be charged if the batches were known: without amplification by sampling."""
        several = self.config.privacy_unit == "user" and self.config.sampling == "example"
        bound = self.max_examples_per_user if several and self.max_examples_per_user else 1
        training = without_amplification(
            noise_multiplier=self._sigma(), steps=self._steps(steps), max_examples_per_user=bound
        )
        return self._selected(self._judged(self._with_counts(training)))

    def of_user(self, *, steps: int | None = None) -> DpEvent:
        """What a release costs one user, whatever the privacy unit is; needs the bound k."""
        assert self.max_examples_per_user is not None
        # Where examples are counted, a user has up to k of them, all perhaps of one item.
        counted = self.max_examples_per_user if self.config.privacy_unit == "example" else 1
        return self._selected(
            self._judged(self._with_counts(self._sampled(self.max_examples_per_user, steps), counted))
        )

    def of_the_rest(self) -> DpEvent:
        """Counts and check of quality alone: what does not hang on the noise of the steps."""
        return self._judged(self._with_counts(composed([])))

    def _sampled(self, max_examples_per_user: int | None, steps: int | None) -> DpEvent:
        return poisson_dp_event(
            noise_multiplier=self._sigma(),
            sampling_prob=self.config.sampling_prob,
            steps=self._steps(steps),
            max_examples_per_user=max_examples_per_user,
            sampled=self.config.sampling,
        )

    def _with_counts(self, training: DpEvent, contributions: int = 1) -> DpEvent:
        """`training` and the counts, or the start; `contributions`: how many units one participant stands for."""
        noise = self.config.start_noise(self._sigma() if self.config.private else None)
        if noise is not None:
            start = start_event(histogram=noise.histogram, statistics=noise.statistics, contributions=contributions)
            return start if self.config.steps == 0 else composed([training, start])
        if self.config.popularity is None:
            return training
        counts = counts_event(noise_multiplier=self.config.popularity.noise_multiplier, contributions=contributions)
        return composed([training, counts])

    def _judged(self, event: DpEvent) -> DpEvent:
        """With the noised comparison that decides on the release. A whole user moves it no more than an example."""
        quality = self.config.minimum_quality
        return event if quality is None else composed([event, counts_event(noise_multiplier=quality.noise_multiplier)])

    def _selected(self, event: DpEvent) -> DpEvent:
        return event if self.tuning is None else self.tuning.event(event)

    def _sigma(self) -> float:
        sigma = self.noise_multiplier if self.noise_multiplier is not None else self.config.noise_multiplier
        if sigma is None:
            raise ValueError("noise_multiplier: the configuration leaves it to calibration, so it has to be given")
        return sigma

    def _steps(self, steps: int | None) -> int:
        return self.config.steps if steps is None else steps


def calibrated_noise_multiplier(
    config: TrainConfig, max_examples_per_user: int | None, *, tuning: Tuning | None = None
) -> float:
    """Sigma as given, or the least that keeps the release within (target_epsilon, target_delta).

    Args:
        config: of the run.
        max_examples_per_user: the contribution bound k; None where there is none.
        tuning: the sweep whose epsilon is meant; None for a run by itself.

    Raises:
        InputError: no sigma does.
    """
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    if config.target_epsilon is None or config.target_delta is None:
        raise ValueError("mode sgd has no noise to calibrate")
    before = config.popularity or (config.start if config.steps else None)
    if before is not None:
        # Its own noise is given, so the sigma that is looked for has no part in it.
        alone = epsilon(RunCost(config, max_examples_per_user, 1.0).of_the_rest(), delta=config.target_delta)
        if alone >= config.target_epsilon:
            which, what = ("popularity", "counts") if config.popularity else ("start", "start")
            noise, cost = f"{which}.noise_multiplier {before.noise_multiplier:g}", "costs"
            if config.minimum_quality is not None:
                noise += f" and minimum_quality.noise_multiplier {config.minimum_quality.noise_multiplier:g}"
                what, cost = "two", "cost"
            raise InputError(
                f"{noise} {cost} epsilon {alone:.4g} "
                f"before any training, and target_epsilon is {config.target_epsilon:g}: give the {what} more noise"
            )
    return calibrate_noise_multiplier(
        target_epsilon=config.target_epsilon,
        target_delta=config.target_delta,
        make_event=lambda sigma: RunCost(config, max_examples_per_user, sigma, tuning).of_release(),
    )
