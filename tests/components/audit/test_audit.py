"""The audit of the real path: below the claim where the code is right, above it for each planted bug."""

import json
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from lazydp.components.audit.audit import Audit, audit
from lazydp.components.audit.cli import command
from lazydp.components.audit.report import AuditReport
from lazydp.components.shared.errors import FormatError, InputError, PrivacyError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.engine import step as engine
from lazydp.components.train.mechanism import contributions
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.mechanism.units import Units
from lazydp.components.train.tables import skip_ahead
from lazydp.components.train.tables.embedding_tables import EmbeddingTables
from lazydp.kernels import ops
from lazydp.kernels.arguments import RowGroups
from lazydp.kernels.noise_key import NoiseKey

Configured = Callable[..., TrainConfig]

FEW = 2000  # shows what is plain to see
MANY = 20_000  # shows half of the noise
SHORT = {"steps": 2, "noise_multiplier": 2 * 2**0.5, "model": {"kind": "two_tower", "embedding_dim": 4}}

USERS = {"privacy_unit": "user", "sampling": "user", "user_gradient": "sum"}


def audited(dataset: Path, config: TrainConfig, *, canaries: int, seed: int = 0) -> Audit:
    return audit(dataset=dataset, config=config, canaries=canaries, key=NoiseKey.for_tests(seed))


# --- the right code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "dpsgd"},
        {"sampling_prob": 0.5},
        {"micro_batch_size": 300},
        {"model": {"kind": "dlrm", "embedding_dim": 4, "bottom_widths": [4], "top_widths": [4]}},
        {"embeddings": {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.1}},
        {"embeddings": {"learning_rate": 0.1, "schedule": {"kind": "cosine", "warmup_steps": 2}}},
        {"privacy_unit": "user", "sampling_prob": 0.3},
        USERS,
        {**USERS, "user_gradient": "mean", "max_grad_norm": {"dense": 0.3, "embeddings": 2.0}},
    ],
    ids=[
        "lazydp",
        "dpsgd",
        "sampled",
        "micro-batches",
        "dlrm",
        "momentum and decay",
        "schedule",
        "user",
        "users",
        "users, norms by group",
    ],
)
def test_right_code_keeps_its_claim(dataset: Path, configured: Configured, changes: dict[str, Any]) -> None:
    report = audited(dataset, configured(**changes), canaries=FEW).report
    assert report.fault is None
    assert 0.1 < report.epsilon_lower_bound < report.epsilon_claimed
    assert report.noise is not None
    assert abs(report.noise.variance_ratio - 1) < report.noise.tolerance
    across = [rule.epsilon_lower_bound for rule in report.rules if rule.statistic == "across"]
    assert max(across) < 0.3


def test_many_canaries_show_a_good_part_of_the_claim(dataset: Path, configured: Configured) -> None:
    report = audited(dataset, configured(**SHORT), canaries=MANY).report
    assert report.epsilon_claimed == pytest.approx(1.993, abs=2e-3)
    assert report.fault is None
    assert report.epsilon_lower_bound > 0.4 * report.epsilon_claimed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_right_code_keeps_its_claim_every_time(dataset: Path, configured: Configured, seed: int) -> None:
    report = audited(dataset, configured(steps=20, noise_multiplier=2.0), canaries=MANY, seed=seed).report
    assert report.fault is None
    assert report.epsilon_lower_bound > 0.35 * report.epsilon_claimed


# --- planted bugs ------------------------------------------------------------------------------------------------


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    def ones(sq_norms: Tensor, *, max_grad_norm: float) -> Tensor:
        return torch.ones_like(sq_norms)

    patch.setattr(contributions, "clip_coefficients", ones)


def noise_missed_at_flush(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EmbeddingTables, "flush", lambda _: None)
    patch.setattr(EmbeddingTables, "pending", lambda _: 0)


def replace_catch_up(patch: pytest.MonkeyPatch, catch_up: Callable[..., None]) -> None:
    """Plant `catch_up` also where catching up and gathering are one operator."""

    def fused(
        weights: Sequence[Tensor],
        last: Sequence[Tensor],
        groups: Sequence[RowGroups],
        key: Tensor,
        indices: Sequence[Tensor],
        offsets: Sequence[Tensor],
        bag_of_lookup: Sequence[Tensor],
        *,
        per_lookup_weights: Sequence[Tensor | None] | None = None,
        **settings: Any,
    ) -> list[Tensor]:
        del bag_of_lookup
        catch_up(weights, last, [group.rows for group in groups], key, **settings)
        return ops.foreach_bag_sum(weights, indices, offsets, per_lookup_weights)

    patch.setattr(ops, "foreach_catch_up_", catch_up)
    patch.setattr(ops, "foreach_catch_up_bag_sum_", fused)


def noise_dropped_on_reading(patch: pytest.MonkeyPatch) -> None:
    def mark_only(weights: Any, last: Sequence[Tensor], rows: Sequence[Tensor], *_: Any, step: int, **__: Any) -> None:
        for since, read in zip(last, rows, strict=True):
            since[read] = step

    replace_catch_up(patch, mark_only)


def stale_last(patch: pytest.MonkeyPatch) -> None:
    right = ops.foreach_catch_up_

    def forgetful(weights: Sequence[Tensor], last: Sequence[Tensor], *arguments: Any, **settings: Any) -> None:
        right(weights, [since.clone() for since in last], *arguments, **settings)

    replace_catch_up(patch, forgetful)


def variance_by_squared_delay(patch: pytest.MonkeyPatch) -> None:
    right = skip_ahead._Weight.write

    def wrong(self: Any, moments: Tensor, transition: Tensor, factor: Tensor, distribution: Any) -> None:
        right(self, moments, transition, factor, distribution)
        factor[:, 0] *= torch.arange(len(moments), 0, -1).sqrt()

    patch.setattr(skip_ahead._Weight, "write", wrong)


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    right = PrivacyParameters.noise_scale
    patch.setattr(PrivacyParameters, "noise_scale", lambda self, group: 0.5 * right(self, group))


def equal_rows_not_added_up(patch: pytest.MonkeyPatch) -> None:
    def by_lookup(indices: Tensor, offsets: Tensor, grad: Tensor, weights: Tensor | None = None) -> Tensor:
        squares = torch.ones(len(indices)) if weights is None else weights.square()
        of_lookups = torch.cat([torch.zeros(1), squares.cumsum(0)])
        of_bags = (of_lookups[offsets[1:]] - of_lookups[offsets[:-1]]).view(grad.shape[:2])
        return (grad.square().sum(dim=2) * of_bags).sum(dim=0)

    def over_tables(*lists: Sequence[Any]) -> Tensor:
        return torch.stack([by_lookup(*table) for table in zip(*lists, strict=True)]).sum(dim=0)

    patch.setattr(ops, "foreach_bag_sq_norms", over_tables)


PLAIN: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    no_clipping: "clipping",
    noise_missed_at_flush: "times the variance of the promised noise .look at the flush",
    noise_dropped_on_reading: "noise on reading",
    stale_last: "noise on reading",
    variance_by_squared_delay: "noise on reading",
}
SUBTLE = [half_the_noise, equal_rows_not_added_up]


@pytest.mark.parametrize("plant", PLAIN)
def test_a_plain_bug_is_caught(
    dataset: Path,
    configured: Configured,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
) -> None:
    plant(monkeypatch)
    report = audited(dataset, configured(), canaries=FEW).report
    assert report.epsilon_lower_bound > report.epsilon_claimed
    assert report.fault is not None
    assert re.search(PLAIN[plant], report.fault), report.fault


@pytest.mark.parametrize("plant", SUBTLE)
def test_twice_the_signal_is_caught_by_many_canaries(
    dataset: Path,
    configured: Configured,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
) -> None:
    plant(monkeypatch)
    config = configured(**SHORT, embeddings={"learning_rate": 0.1})
    report = audited(dataset, config, canaries=MANY).report
    assert report.epsilon_lower_bound > report.epsilon_claimed
    assert report.fault is not None


def test_examples_of_a_user_clipped_one_by_one_are_caught(
    dataset: Path, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user of four examples, each of which may send C."""
    monkeypatch.setattr(engine, "units_of", lambda size, user_sizes, privacy: Units.examples(size))
    report = audited(dataset, configured(**USERS), canaries=FEW).report
    assert report.epsilon_lower_bound > report.epsilon_claimed
    assert report.fault is not None


def test_less_noise_than_promised_is_a_fault_even_below_the_bound(
    dataset: Path, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_the_noise(monkeypatch)
    report = audited(dataset, configured(), canaries=200).report
    assert report.noise is not None
    assert report.noise.variance_ratio == pytest.approx(0.25, abs=0.05)
    assert report.fault is not None


# --- the report and the command ----------------------------------------------------------------------------------


def test_an_audit_repeats_under_a_seed_and_not_without(dataset: Path, configured: Configured) -> None:
    first, second = (audited(dataset, configured(steps=2), canaries=200, seed=3) for _ in range(2))
    assert first.report == second.report
    assert first.report.seeded
    unseeded = [audit(dataset=dataset, config=configured(steps=2), canaries=200) for _ in range(2)]
    assert not unseeded[0].report.seeded
    assert (unseeded[0].included != unseeded[1].included).any()


def test_the_report_is_private_whole_and_read_back(dataset: Path, configured: Configured, tmp_path: Path) -> None:
    found = audited(dataset, configured(steps=2), canaries=200)
    out = tmp_path / "audit"
    found.write(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert sorted(file.name for file in out.iterdir()) == ["audit.json", "audit.svg"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in out.iterdir())
    assert AuditReport.load(out) == found.report == AuditReport.load(out / "audit.json")
    document = json.loads((out / "audit.json").read_text())
    assert document["format_version"] == 2
    assert document["epsilon_lower_bound"] <= document["epsilon_claimed"]
    assert (out / "audit.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(InputError, match="already exists"):
        found.write(out)
    (out / "audit.json").write_text(json.dumps(document | {"format_version": 3}))
    with pytest.raises(FormatError, match="format_version 3"):
        AuditReport.load(out)
    (out / "audit.json").write_text(json.dumps(document | {"delta": 2}))
    with pytest.raises(FormatError, match="delta"):
        AuditReport.load(out)


def test_a_statement_carries_the_audit_of_its_own_run_only(
    dataset: Path, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = audited(dataset, configured(steps=2), canaries=200).report
    run = {"dataset": report.dataset, "config": report.config, "code_version": report.code_version}
    assert report.config == configured(steps=2).digest()
    statement = report.statement(**run)
    assert statement.epsilon_lower_bound == report.epsilon_lower_bound
    assert statement.confidence == report.confidence
    assert "200 canaries" in statement.method
    for what, said in (("dataset", "dataset"), ("config", "configuration"), ("code_version", "version")):
        with pytest.raises(InputError, match=said):
            report.statement(**run | {what: "another"})
    half_the_noise(monkeypatch)
    wrong = audited(dataset, configured(steps=2), canaries=200).report
    with pytest.raises(PrivacyError, match="release nothing"):
        wrong.statement(**run)


def test_what_cannot_be_audited_is_refused(dataset: Path, configured: Configured) -> None:
    with pytest.raises(InputError, match="mode sgd"):
        audit(dataset=dataset, config=configured(mode="sgd"))
    with pytest.raises(InputError, match="at least 100 canaries"):
        audit(dataset=dataset, config=configured(), canaries=99)
    with pytest.raises(InputError, match="confidence"):
        audit(dataset=dataset, config=configured(), confidence=1.0)


def test_the_command_reports_and_fails_where_the_claim_does(
    dataset: Path, configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(configured(steps=2).model_dump_json())
    arguments = ["--dataset", str(dataset), "--config", str(config), "--canaries", "200", "--seed", "1", "--out"]
    result = CliRunner().invoke(command, [*arguments, str(tmp_path / "right")])
    assert result.exit_code == 0, result.output
    assert "lower bound" in result.output
    half_the_noise(monkeypatch)
    result = CliRunner().invoke(command, [*arguments, str(tmp_path / "wrong")])
    assert isinstance(result.exception, PrivacyError)
    assert "release nothing" in str(result.exception)
    # The evidence is kept.
    assert AuditReport.load(tmp_path / "wrong").fault is not None
    result = CliRunner().invoke(command, [*arguments, str(tmp_path / "right")])
    assert isinstance(result.exception, InputError)
