"""What an audit found, as a document: the lower bound beside the claim, and what both rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from lazydp.components.budget.statement import AuditResult
from lazydp.components.shared.errors import FormatError, InputError, PrivacyError
from lazydp.components.shared.files import PRIVATE_FILE, read_json, write_json
from lazydp.components.shared.frozen_model import FrozenModel
from lazydp.components.shared.validation import Document

FORMAT_VERSION = 2
REPORT = "audit.json"
_CONSEQUENCE = "the training code does not do what it states; release nothing that it made"
_SHOWN_BY = {
    "steps": "how rows moved in single steps: look at clipping, at sums, and at noise on reading",
    "along": "how far rows moved along their gradients: look at clipping, at sums, and at the flush",
    "across": "how much noise rows hold that were read: look at noise on reading, and at the flush",
}
METHOD = "one training run with canaries (Steinke, Nasr, Jagielski 2023; Mahloujifar, Melis, Chaudhuri 2024)"


class RuleResult(FrozenModel):
    """One way to guess the coins: `statistic` of the canaries, `guesses` of which `correct` were right."""

    statistic: Literal["steps", "along", "across"]
    said_to_be_in: Literal["high", "low"]
    guesses: int = Field(ge=0)
    correct: int = Field(ge=0)
    confidence: float = Field(gt=0, lt=1)
    epsilon_lower_bound: float = Field(ge=0)


class NoiseCheck(FrozenModel):
    """Noise of the canaries' rows across their gradients, over what the run promises.

    variance_ratio: measured over promised variance; 1 where all is right.
    tolerance: five standard deviations of that ratio.
    """

    promised_std: float = Field(gt=0)
    variance_ratio: float = Field(ge=0)
    tolerance: float = Field(gt=0)

    @property
    def kept(self) -> bool:
        """Whether there was at least the promised noise."""
        return self.variance_ratio >= 1 - self.tolerance


class AuditReport(FrozenModel):
    """The result of one audit.

    `epsilon_lower_bound` is the epsilon at `delta` of the same run with so much more noise that the guesses just refute
    it, at `confidence` over all rules together. Where the claim itself is refuted (the bound reaches
    `epsilon_claimed`), what ran was not what was claimed.
    """

    epsilon_lower_bound: float = Field(ge=0)
    epsilon_claimed: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0, lt=1)
    canaries: int = Field(gt=0)
    watched: int = Field(default=0, ge=0, description="canaries that were looked at after every step")
    included: int = Field(ge=0)
    rules: tuple[RuleResult, ...]
    noise: NoiseCheck | None = Field(description="none where rows have one column: nothing lies across")
    mode: str
    privacy_unit: Literal["example", "user"]
    max_examples_per_user: int | None
    noise_multiplier: float
    max_grad_norm: float | dict[str, float] = Field(description="C, or one for each group of parameters")
    sampling_prob: float
    expected_batch_size: float
    steps: int
    dataset: str
    config: str
    code_version: str
    seeded: bool = Field(description="whether coins and noise came from a seed, so that the audit can be repeated")

    @property
    def fault(self) -> str | None:
        """What contradicts the claim, which checks found it and what to look at; None where nothing does."""
        found = []
        if self.epsilon_lower_bound >= self.epsilon_claimed:
            best = max(self.rules, key=lambda rule: rule.epsilon_lower_bound)
            found.append(
                f"the audit shows epsilon of at least {self.epsilon_lower_bound:.3g} at delta {self.delta:g} with "
                f"{self.confidence:.0%} confidence, the run claims {self.epsilon_claimed:.3g} ({best.correct} of "
                f"{best.guesses} guesses right by {_SHOWN_BY[best.statistic]})"
            )
        if self.noise is not None and not self.noise.kept:
            found.append(
                f"rows hold {self.noise.variance_ratio:.3g} times the variance of the promised noise (look at the "
                "flush, at noise on reading, at the noise multiplier, and at weights so large that float32 loses noise)"
            )
        return f"{'; '.join(found)}: {_CONSEQUENCE}" if found else None

    def lines(self) -> list[str]:
        """The report for a person."""
        best = max(self.rules, key=lambda rule: rule.epsilon_lower_bound)
        found = [
            f"claimed      epsilon {self.epsilon_claimed:.4g} at delta {self.delta:g} per {self.privacy_unit}",
            f"lower bound  epsilon {self.epsilon_lower_bound:.4g} at {self.confidence:.0%} confidence",
            f"             {best.correct} of {best.guesses} guesses right, {self.canaries} canaries",
        ]
        if self.noise is not None:
            ratio, tolerance = self.noise.variance_ratio, self.noise.tolerance
            found.append(f"noise        {ratio:.4g} of the promised variance (1 within {tolerance:.2g})")
        return found

    def statement(self, *, dataset: str, config: str, code_version: str) -> AuditResult:
        """As the privacy statement of a run carries it.

        Args:
            dataset: fingerprint of the run's dataset, private.
            config: digest of the run's configuration.
            code_version: of the run.

        Raises:
            InputError: the audit is of another dataset, configuration or version.
            PrivacyError: the audit contradicts the claim.
        """
        for what, audited, run in (
            ("dataset", self.dataset, dataset),
            ("configuration", self.config, config),
            ("lazydp version", self.code_version, code_version),
        ):
            if audited != run:
                raise InputError(
                    f"the audit is of another {what} than the run: a statement carries an audit of the very run it "
                    "describes; audit again with the run's configuration"
                )
        if self.fault is not None:
            raise PrivacyError(self.fault)
        method = f"{METHOD}, {self.canaries} canaries" + (", repeatable by seed" if self.seeded else "")
        return AuditResult(epsilon_lower_bound=self.epsilon_lower_bound, confidence=self.confidence, method=method)

    def save(self, folder: Path) -> None:
        """Write `audit.json`."""
        write_json(folder / REPORT, self.model_dump(mode="json"), format_version=FORMAT_VERSION, mode=PRIVATE_FILE)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an `audit.json`, or the one in the folder `path`.

        Raises:
            FormatError: missing, of a newer format, or not a report.
        """
        file = path / REPORT if path.is_dir() else path
        document = read_json(file, format_version=FORMAT_VERSION, what="audit report")
        return Document(f"audit report {file}", document).validated(cls, raises=FormatError)
