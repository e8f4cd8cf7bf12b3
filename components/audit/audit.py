"""One audit, from top to bottom: toss coins, train with the canaries that are in, look at their rows, bound epsilon."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lazydp.components.audit.canaries import CANARY, AuditedDataset, CanaryModel, direction, toss
from lazydp.components.audit.guesses import Coins, Floats, Outcome, Statistic, judge, rules, strongest
from lazydp.components.audit.plot import draw
from lazydp.components.audit.promise import promised_separation, promised_std
from lazydp.components.audit.report import AuditReport, NoiseCheck, RuleResult
from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.build import build_model
from lazydp.components.models.recommender import initial_tables
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_DIRECTORY, PRIVATE_FILE, atomic_directory, write_bytes
from lazydp.components.shared.progress import Progress
from lazydp.components.shared.version import code_version
from lazydp.components.train.config import GroupNorms, TrainConfig
from lazydp.components.train.data.loader import Prefetcher
from lazydp.components.train.run.batches import batch_maker
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.spending import check_event
from lazydp.components.train.run.train import contribution_bound, embedding_optimizer, engine_for
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

    The model is thrown away. It takes as long as the run it audits, and no budget: see docs/audit.md.

    Args:
        dataset: what ingest wrote.
        config: of the run to audit.
        canaries: m, how many coins are tossed.
        confidence: in (0, 1), of the lower bound.
        key: of coins, sampling and noise; None for a fresh secret one.

    Raises:
        InputError: a configuration without privacy, too few canaries, or a confidence out of range.
    """
    _check(config, canaries, confidence)
    data = EncodedDataset.open(dataset)
    identity = _identity(data, config)
    secret = key if key is not None else NoiseKey.generate()
    included = toss(secret, canaries)
    rows = _train(data, identity, secret, included)
    secret.destroy()
    return _conclude(rows, included, identity, data, confidence=confidence, seeded=secret.is_test)


def _check(config: TrainConfig, canaries: int, confidence: float) -> None:
    if not config.private:
        raise InputError("mode sgd claims no epsilon: there is nothing to audit")
    if canaries < FEWEST_CANARIES:
        raise InputError(f"an audit needs at least {FEWEST_CANARIES} canaries to show anything, found {canaries}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be in (0, 1), found {confidence}")


def _identity(data: EncodedDataset, config: TrainConfig) -> RunIdentity:
    """The audited run, as a run of its own that no ledger knows."""
    bound = contribution_bound(data)
    if config.privacy_unit == "user" and bound is None:
        raise InputError(f"privacy_unit user needs a bound on the examples of a user, and dataset {data.path} has none")
    return RunIdentity(
        run_id=f"audit-{uuid.uuid4().hex[:16]}",
        config=config,
        dataset_fingerprint=data.manifest.fingerprint,
        code_version=code_version(),
        noise_multiplier=config.calibrated_noise_multiplier(bound),
    )


def _examples_each(data: EncodedDataset, config: TrainConfig) -> int:
    """Examples of one canary: it stands for one privacy unit."""
    return contribution_bound(data) or 1 if config.privacy_unit == "user" else 1


def _contributions_each(data: EncodedDataset, config: TrainConfig) -> int:
    """How many clipped gradients one canary may send in a step: users who are sampled send one."""
    return 1 if config.sampling == "user" else _examples_each(data, config)


def _clipping(config: TrainConfig) -> tuple[float, float]:
    """C of the tables, and what the noise on them is multiplied by because the dense layers have a norm of their own.

    Worked out apart from the code that adds the noise, whose errors an audit is to find.
    """
    norms = config.max_grad_norm
    return (norms.embeddings, math.sqrt(2)) if isinstance(norms, GroupNorms) else (norms, 1.0)


def _train(data: EncodedDataset, identity: RunIdentity, secret: NoiseKey, included: Coins) -> Tensor:
    """The canaries' rows [m, D] of the trained and flushed model; they began at zero."""
    config = identity.config
    model = CanaryModel(
        build_model(data.spec, config.model), num_canaries=len(included), max_grad_norm=_clipping(config)[0]
    )
    tables = initial_tables(model)
    tables[CANARY].zero_()
    engine = engine_for(model, identity, secret, tables=tables)
    audited = AuditedDataset(data, np.flatnonzero(included), examples_each=_examples_each(data, config))
    make_batches = batch_maker(audited, config, secret)
    check_event(make_batches.sampler, identity, max_examples_per_user=contribution_bound(data))
    batches = Prefetcher(make_batches, first=1, last=config.steps)
    with batches, Progress("audit", total=config.steps, unit="steps") as progress:
        for _, micro_batches in batches:
            engine.step(micro_batches)
            progress.advance()
    engine.flush()
    return engine.table_weights()[CANARY]


def _conclude(
    rows: Tensor,
    included: Coins,
    identity: RunIdentity,
    data: EncodedDataset,
    *,
    confidence: float,
    seeded: bool,
) -> Audit:
    """Judge the rows and put the bound beside the claim."""
    config, bound = identity.config, contribution_bound(data)
    assert identity.noise_multiplier is not None
    assert config.target_delta is not None
    statistics = _statistics(rows)
    max_grad_norm, factor = _clipping(config)
    noise_multiplier = factor * identity.noise_multiplier
    separation = promised_separation(
        noise_multiplier=noise_multiplier,
        sampling_prob=config.sampling_prob,
        steps=config.steps,
        examples_each=_contributions_each(data, config),
    )
    outcomes = [
        judge(rule, statistics, included, delta=config.target_delta, confidence=confidence)
        for rule in rules(
            canaries=len(included), separation=separation, delta=config.target_delta, confidence=confidence
        )
    ]
    std = promised_std(
        embedding_optimizer(config),
        noise_scale=noise_multiplier * max_grad_norm / config.expected_batch_size,
        steps=config.steps,
    )
    report = AuditReport(
        epsilon_lower_bound=strongest(outcomes).epsilon_lower_bound,
        # Of training alone: canaries show nothing of released counts, whose part would only loosen the comparison.
        epsilon_claimed=epsilon(identity.training_event(bound), delta=config.target_delta),
        delta=config.target_delta,
        confidence=confidence,
        canaries=len(included),
        included=int(included.sum()),
        rules=tuple(_result(outcome, confidence) for outcome in outcomes),
        noise=_noise_check(statistics["across"], columns=rows.shape[1] - 1, promised=std),
        mode=config.mode,
        privacy_unit=config.privacy_unit,
        max_examples_per_user=bound if config.privacy_unit == "user" else None,
        noise_multiplier=identity.noise_multiplier,
        max_grad_norm=config.stated_norms(),
        sampling_prob=config.sampling_prob,
        expected_batch_size=config.expected_batch_size,
        steps=config.steps,
        dataset=identity.dataset_fingerprint,
        config=config.digest(),
        code_version=identity.code_version,
        seeded=seeded,
    )
    return Audit(report, statistics["along"] / std, included)


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
