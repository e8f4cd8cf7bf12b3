"""One audit, from top to bottom: toss coins, train with the canaries that are in, look at their rows, bound epsilon."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from lazydp.components.audit.canaries import CANARY, AuditedDataset, CanaryModel, direction, toss
from lazydp.components.audit.guesses import Coins, Floats, Outcome, Rule, Statistic, judge, rules, strongest
from lazydp.components.audit.hypotheses import Hypotheses
from lazydp.components.audit.plot import draw
from lazydp.components.audit.promise import promised_separation, promised_std
from lazydp.components.audit.report import AuditReport, NoiseCheck, RuleResult
from lazydp.components.audit.watch import Watch, separation
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.build import build_model
from lazydp.components.models.recommender import initial_tables
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_DIRECTORY, PRIVATE_FILE, atomic_directory, write_bytes
from lazydp.components.shared.progress import Progress
from lazydp.components.shared.version import code_version
from lazydp.components.train.config import NormSettings, TrainConfig
from lazydp.components.train.data.loader import Prefetcher
from lazydp.components.train.run.batches import batch_maker
from lazydp.components.train.run.costs import RunCost, calibrated_noise_multiplier
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.settings_check import contribution_bound
from lazydp.components.train.run.spending import check_event
from lazydp.components.train.run.train import embedding_optimizer, engine_for
from lazydp.kernels.noise_key import NoiseKey

FEWEST_CANARIES = 100
PLOT = "audit.svg"

# A table's noise is measured on canaries times columns values; its variance is known to sqrt(2 / n).
_STANDARD_DEVIATIONS = 5.0


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found; internal, like every figure of a run.

    Attributes:
        report: the result.
        along: how far each canary's row went along its gradient, in promised standard deviations of its noise, [m].
        included: which canaries were in, [m].
    """

    report: AuditReport
    along: Floats
    included: Coins

    def write(self, out: Path) -> None:
        """Write the report and its plot into the new folder `out`, private (mode 0700).

        Raises:
            InputError: `out` exists and is not empty.
        """
        with atomic_directory(out, mode=PRIVATE_DIRECTORY) as folder:
            self.report.save(folder)
            write_bytes(folder / PLOT, draw(self.report, self.along, self.included), mode=PRIVATE_FILE)


def audit(
    *,
    dataset: Path,
    config: TrainConfig,
    canaries: int = 10_000,
    confidence: float = 0.95,
    key: NoiseKey | None = None,
) -> Audit:
    """Train as `config` says on the dataset and canaries, and bound epsilon from below by what the model shows of them.

    The first half of the canaries is looked at after every step, the others in the last model alone. The model is
    thrown away. It takes about as long as the run it audits, and no budget: see docs/audit.md.

    Args:
        dataset: what ingest wrote.
        config: of the run to audit.
        canaries: how many coins are tossed.
        confidence: in (0, 1), of the lower bound.
        key: of coins, sampling and noise; None for a fresh secret one.

    Raises:
        InputError: a configuration without privacy, too few canaries, or a confidence out of range.
    """
    _check(config, canaries, confidence)
    data = EncodedDataset.open(dataset)
    run = _AuditedRun.of(data, config, watched=canaries // 2)
    secret = key if key is not None else NoiseKey.generate()
    included = toss(secret, canaries)
    found = _train(run, secret, included)
    secret.destroy()
    return _conclude(run, found, included, confidence=confidence, seeded=secret.is_test)


def _check(config: TrainConfig, canaries: int, confidence: float) -> None:
    if not config.private:
        raise InputError("mode sgd claims no epsilon: there is nothing to audit")
    if config.distributed is not None:
        raise InputError(
            "an audit follows the rows of its canaries by their numbers, in one process: audit the same configuration "
            "without `distributed`, which changes where rows lie and nothing of the mechanism"
        )
    if canaries < FEWEST_CANARIES:
        raise InputError(f"an audit needs at least {FEWEST_CANARIES} canaries to show anything, found {canaries}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be in (0, 1), found {confidence}")


@dataclass(frozen=True, slots=True)
class _AuditedRun:
    """What is settled before the run.

    Attributes:
        data: the dataset.
        identity: the audited run, as a run of its own that no ledger knows.
        bound: most training examples of a user; None without such a bound.
        watched: canaries that are looked at after every step.
        max_grad_norm: C of the tables.
        noise_multiplier: of the noise on the tables, in units of C.
    """

    data: EncodedDataset
    identity: RunIdentity
    bound: int | None
    watched: int
    max_grad_norm: float
    noise_multiplier: float

    @classmethod
    def of(cls, data: EncodedDataset, config: TrainConfig, *, watched: int) -> Self:
        bound = contribution_bound(data)
        if config.privacy_unit == "user" and bound is None:
            raise InputError(
                f"privacy_unit user needs a bound on the examples of a user, and dataset {data.path} has none"
            )
        noise_multiplier = calibrated_noise_multiplier(config, bound)
        identity = RunIdentity(
            run_id=f"audit-{uuid.uuid4().hex[:16]}",
            config=config,
            dataset_fingerprint=data.manifest.fingerprint,
            code_version=code_version(),
            noise_multiplier=noise_multiplier,
        )
        # Worked out apart from the code that adds the noise, whose errors an audit is to find: a norm for each of two
        # groups multiplies the noise by sqrt(2).
        norms = config.max_grad_norm
        max_grad_norm, factor = (norms.embeddings, math.sqrt(2)) if isinstance(norms, NormSettings) else (norms, 1.0)
        return cls(data, identity, bound, watched, max_grad_norm, factor * noise_multiplier)

    @property
    def config(self) -> TrainConfig:
        return self.identity.config

    @property
    def examples_each(self) -> int:
        """Examples of one canary: it stands for one privacy unit."""
        return self.bound or 1 if self.config.privacy_unit == "user" else 1

    @property
    def gradients_each(self) -> int:
        """How many clipped gradients one canary may send in a step: users who are sampled send one."""
        return 1 if self.config.sampling == "user" else self.examples_each

    @property
    def noise_scale(self) -> float:
        """Standard deviation of one step's noise on the averaged gradient."""
        return self.noise_multiplier * self.max_grad_norm / self.config.expected_batch_size

    @property
    def delta(self) -> float:
        assert self.config.target_delta is not None
        return self.config.target_delta

    def hypotheses(self) -> Hypotheses:
        """The claim is that of training alone: canaries show nothing of released counts."""
        assert self.identity.noise_multiplier is not None
        return Hypotheses(
            lambda noise_multiplier: RunCost(self.config, self.bound, noise_multiplier).of_training(),
            noise_multiplier=self.identity.noise_multiplier,
            delta=self.delta,
        )

    def rules(self, canaries: int, *, confidence: float) -> tuple[Rule, ...]:
        steps, sampling_prob = self.config.steps, self.config.sampling_prob
        return rules(
            watched=self.watched,
            others=canaries - self.watched,
            separation_of_steps=separation(
                signal=1 / self.noise_multiplier,
                sampling_prob=sampling_prob,
                steps=steps,
                gradients_each=self.gradients_each,
            ),
            separation_along=promised_separation(
                noise_multiplier=self.noise_multiplier,
                sampling_prob=sampling_prob,
                steps=steps,
                examples_each=self.gradients_each,
            ),
            confidence=confidence,
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """The canaries' rows [m, D] of the trained and flushed model, which began at zero; `Watch.log_ratios` [watched]."""

    rows: Tensor
    log_ratios: Floats


def _train(run: _AuditedRun, secret: NoiseKey, included: Coins) -> _Found:
    config = run.config
    model = CanaryModel(
        build_model(run.data.spec, config.model), num_canaries=len(included), max_grad_norm=run.max_grad_norm
    )
    tables = initial_tables(model)
    tables[CANARY].zero_()
    engine = engine_for(model, run.identity, secret, tables=tables)
    audited = AuditedDataset(run.data, np.flatnonzero(included), examples_each=run.examples_each)
    make_batches = batch_maker(audited, config, secret)
    check_event(make_batches.sampler, run.identity, max_examples_per_user=run.bound)
    watch = Watch(
        engine,
        embedding_optimizer(config),
        count=run.watched,
        signal=1 / run.noise_multiplier,
        noise_scale=run.noise_scale,
        sampling_prob=config.sampling_prob,
        gradients_each=run.gradients_each,
    )
    batches = Prefetcher(make_batches, first=1, last=config.steps)
    with batches, Progress("audit", total=config.steps, unit="steps") as progress:
        for _, micro_batches in batches:
            engine.step(micro_batches)
            watch.look()
            progress.advance()
    engine.flush()
    return _Found(engine.table_weights()[CANARY], watch.log_ratios)


def _conclude(run: _AuditedRun, found: _Found, included: Coins, *, confidence: float, seeded: bool) -> Audit:
    """Judge what was found and put the bound beside the claim."""
    config, hypotheses = run.config, run.hypotheses()
    of_last_model = _statistics(found.rows)
    std = promised_std(embedding_optimizer(config), noise_scale=run.noise_scale, steps=config.steps)
    outcomes = []
    for rule in run.rules(len(included), confidence=confidence):
        # Watched rows got their noise step by step: they say nothing of noise that is drawn for many steps at once.
        scores = found.log_ratios if rule.statistic == "steps" else of_last_model[rule.statistic][run.watched :]
        coins = included[: run.watched] if rule.statistic == "steps" else included[run.watched :]
        outcomes.append(judge(rule, scores, coins, hypotheses, confidence=confidence))
    report = AuditReport(
        epsilon_lower_bound=strongest(outcomes).epsilon_lower_bound,
        epsilon_claimed=hypotheses.claim,
        delta=run.delta,
        confidence=confidence,
        canaries=len(included),
        watched=run.watched,
        included=int(included.sum()),
        rules=tuple(_result(outcome, confidence) for outcome in outcomes),
        noise=_noise_check(of_last_model["across"], columns=found.rows.shape[1] - 1, promised=std),
        mode=config.mode,
        privacy_unit=config.privacy_unit,
        max_examples_per_user=run.bound if config.privacy_unit == "user" else None,
        noise_multiplier=hypotheses.noise_multiplier,
        max_grad_norm=config.stated_norms(),
        sampling_prob=config.sampling_prob,
        expected_batch_size=config.expected_batch_size,
        steps=config.steps,
        dataset=run.identity.dataset_fingerprint,
        config=config.digest(),
        code_version=run.identity.code_version,
        seeded=seeded,
    )
    return Audit(report, of_last_model["along"] / std, included)


def _statistics(rows: Tensor) -> dict[Statistic, Floats]:
    """How far each row [m, D] went along the canaries' gradient, and the square of how far across it; [m] each."""
    moved = rows.double()
    towards = direction(rows.shape[1]).double()
    along = -(moved @ towards)  # a step goes against the gradient
    across = (moved.square().sum(dim=1) - along.square()).clamp(min=0.0)
    return {"along": along.numpy(), "across": across.numpy()}


def _noise_check(across: Floats, *, columns: int, promised: float) -> NoiseCheck | None:
    if not columns:
        return None
    values = across.size * columns
    return NoiseCheck(
        promised_std=promised,
        variance_ratio=float(across.sum()) / (values * promised**2),
        tolerance=_STANDARD_DEVIATIONS * math.sqrt(2 / values),
    )


def _result(outcome: Outcome, confidence: float) -> RuleResult:
    rule = outcome.rule
    return RuleResult(
        statistic=rule.statistic,
        said_to_be_in="high" if rule.high_is_in else "low",
        guesses=rule.guesses,
        correct=outcome.correct,
        confidence=1 - (1 - confidence) * rule.share,
        epsilon_lower_bound=outcome.epsilon_lower_bound,
    )
