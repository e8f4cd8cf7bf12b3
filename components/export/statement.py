"""The privacy statement of a run, computed from what was really done.

A run that a sweep kept is stated as the sweep: choosing it is part of what was done to the data.
"""

from __future__ import annotations

import math

from lazydp.components.budget.accounting.epsilon import accountant_version, epsilon, epsilon_over_steps
from lazydp.components.budget.statement import (
    CHOICE_OF_SETTINGS,
    COUNTS_FLOATING_POINT,
    DEFAULT_NOT_COVERED,
    DEFAULT_PUBLIC,
    FLOATING_POINT,
    JOINT_GUARANTEE,
    MODEL_GUARANTEE,
    START_FLOATING_POINT,
    AuditResult,
    Family,
    PopularityRelease,
    PrivacyStatement,
    QualityCheck,
    RealisedNoise,
    SpentElsewhere,
    StartRelease,
    StepEpsilon,
)
from lazydp.components.features.spec import FeatureSpec, LeaveLastOut
from lazydp.components.models.config import TwoTowerConfig
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.sampler import sampler_name
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.popularity import sensitivity

# Stated by runs without privacy, where no epsilon goes with it.
_NO_DELTA = 1e-5

_NO_SAMPLER = "none: no step was taken"
_SEEN_ITEMS = "that a user's items are left out of that user's own recommendations"


def statement_of(
    identity: RunIdentity,
    *,
    spec: FeatureSpec,
    max_examples_per_user: int | None,
    steps: int,
    test_key: bool,
    spent_elsewhere: tuple[SpentElsewhere, ...] = (),
    family: Family | None = None,
    audit: AuditResult | None = None,
    realised_noise: RealisedNoise | None = None,
) -> PrivacyStatement:
    """The statement of a run that is about to be released.

    Args:
        identity: of the run.
        spec: of the dataset.
        max_examples_per_user: the contribution bound k of the dataset; None where there is none.
        steps: steps really done.
        test_key: whether the noise key was made for tests.
        spent_elsewhere: what other releases of the dataset cost.
        family: that the dataset declared, as the ledger knows it.
        audit: lower bound that an audit of this run's configuration found.
        realised_noise: how much of a step's noise arrives in the weights.
    """
    config = identity.config
    private = config.private and not test_key
    delta = config.target_delta if config.target_delta is not None else _NO_DELTA
    sigma = identity.noise_multiplier or 0.0

    def figure(value: float) -> float | None:
        return value if private and math.isfinite(value) else None

    spent = user_level = unamplified = rdp = without_counts = None
    over_steps: tuple[StepEpsilon, ...] = ()
    if private:
        cost = RunCost.of(identity, max_examples_per_user)
        event = cost.of_release(steps=steps)
        spent, rdp = figure(epsilon(event, delta=delta)), figure(epsilon(event, delta=delta, accountant="rdp"))
        if config.popularity is not None and config.start is None:
            without_counts = figure(epsilon(cost.of_release_without_counts(steps=steps), delta=delta))
        over_steps = (
            ()
            if identity.tuning is not None or steps == 0
            else tuple(
                StepEpsilon(step=step, epsilon=value)
                for step, value in epsilon_over_steps(lambda step: cost.of_run(steps=step), steps=steps, delta=delta)
            )
        )
        unamplified = figure(epsilon(cost.of_known_batches(steps=steps), delta=delta))
        if max_examples_per_user is not None:
            user_level = figure(epsilon(cost.of_user(steps=steps), delta=delta))
    return PrivacyStatement(
        private=private,
        why_not_private=_why_not_private(config.private, test_key=test_key),
        epsilon=spent,
        delta=delta,
        # A selection has no loss distribution (`accounting.epsilon`).
        accountant="pld" if identity.tuning is None else "rdp",
        accountant_version=accountant_version(),
        epsilon_rdp=rdp,
        privacy_unit=config.privacy_unit,
        max_examples_per_user=max_examples_per_user,
        sampler=sampler_name(config.sampling) if steps else _NO_SAMPLER,
        user_gradient=config.user_gradient,
        noise_multiplier=sigma,
        max_grad_norm=config.stated_norms() if config.private and steps else None,
        expected_batch_size=config.expected_batch_size if steps else None,
        sampling_prob=config.sampling_prob,
        steps=steps,
        epsilon_without_amplification=unamplified,
        epsilon_user_level=user_level,
        epsilon_over_steps=over_steps,
        popularity=_popularity(identity, max_examples_per_user, epsilon_without=without_counts),
        start=_start(identity),
        minimum_quality=_quality(config),
        guarantee=JOINT_GUARANTEE if _reads_histories_alone(config) else MODEL_GUARANTEE,
        assumed_public=(*DEFAULT_PUBLIC, *_public(identity)),
        not_covered=(*DEFAULT_NOT_COVERED, *_not_covered(identity, spec, max_examples_per_user)),
        family=family,
        spent_elsewhere=spent_elsewhere,
        tuning=identity.tuning,
        test_key=test_key,
        floating_point=_floating_point(config, steps=steps),
        code_version=identity.code_version,
        audit=audit,
        realised_noise=realised_noise,
    )


def _why_not_private(has_noise: bool, *, test_key: bool) -> str | None:
    if not has_noise:
        return "trained in mode sgd, without clipping and without noise"
    return "trained under a noise key made for tests, which everyone knows" if test_key else None


def _popularity(
    identity: RunIdentity, max_examples_per_user: int | None, *, epsilon_without: float | None
) -> PopularityRelease | None:
    config = identity.config
    noise = config.start_noise(identity.noise_multiplier)
    if noise is not None and config.private:
        return PopularityRelease(
            counted=_counted(config),
            sensitivity=1.0,
            noise_multiplier=noise.histogram,
            epsilon_without=epsilon_without,
        )
    if config.popularity is None:
        return None
    return PopularityRelease(
        counted="positive training examples" if config.privacy_unit == "example" else "users, once for each item",
        sensitivity=sensitivity(config.privacy_unit, max_examples_per_user=max_examples_per_user),
        noise_multiplier=config.popularity.noise_multiplier,
        epsilon_without=epsilon_without,
    )


def _counted(config: TrainConfig) -> str:
    if config.privacy_unit == "example":
        return "positive training examples"
    return "users, each with one vector of length 1 over the items of the history (the latest weigh most, where known)"


def _start(identity: RunIdentity) -> StartRelease | None:
    config = identity.config
    noise = config.start_noise(identity.noise_multiplier)
    if noise is None or not config.private:
        return None
    return StartRelease(
        released=("the counts", "products of histories with directions of public features, or with each other"),
        contribution="a user's history as one vector" if config.privacy_unit == "user" else "an item and its history",
        sensitivity=1.0,
        noise_multiplier=1.0 / noise.mu,
        histogram_noise_multiplier=noise.histogram,
        statistics_noise_multiplier=noise.statistics,
    )


def _quality(config: TrainConfig) -> QualityCheck | None:
    minimum = config.minimum_quality
    if minimum is None:
        return None
    return QualityCheck(
        metric=minimum.metric,
        over_popularity=minimum.over_popularity,
        sensitivity=minimum.sensitivity,
        noise_multiplier=minimum.noise_multiplier,
    )


def _reads_histories_alone(config: TrainConfig) -> bool:
    return isinstance(config.model, TwoTowerConfig) and config.model.user == "history"


def _floating_point(config: TrainConfig, *, steps: int) -> str:
    parts = [FLOATING_POINT] if steps or config.start is None else []
    parts += [COUNTS_FLOATING_POINT] if config.popularity is not None else []
    parts += [START_FLOATING_POINT] if config.start is not None else []
    return "; ".join(parts)


def _public(identity: RunIdentity) -> list[str]:
    if identity.tuning is None or identity.tuning.public_dataset is None:
        return []
    return [f"dataset {identity.tuning.public_dataset[:12]}, on which the trials of the sweep were scored"]


def _not_covered(identity: RunIdentity, spec: FeatureSpec, max_examples_per_user: int | None) -> list[str]:
    found = [CHOICE_OF_SETTINGS] if identity.tuning is None else []
    found += [_SEEN_ITEMS] if spec.user is not None and spec.item is not None else []
    if identity.config.privacy_unit == "example":
        found += _beyond_the_example(spec, max_examples_per_user)
    return found


def _beyond_the_example(spec: FeatureSpec, max_examples_per_user: int | None) -> list[str]:
    """What else a row of the log decides than its own training example: an example's epsilon does not cover it."""
    effects = []
    if spec.history is not None:
        effects.append("it also stands in the histories of its user's later examples")
    if isinstance(spec.effective_split, LeaveLastOut):
        effects.append("it decides which of its user's rows is held out")
    if max_examples_per_user is not None:
        effects.append(f"it decides which {max_examples_per_user} of its user's rows are kept")
    if not effects:
        return []
    told = ", and ".join(effects)
    return [f"an interaction beyond its own training example: {told}; privacy_unit user covers a whole person"]
