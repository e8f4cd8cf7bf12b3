"""The privacy statement: what a reader of a bundle is told about the privacy it was made with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lazydp.components.budget.accounting.tuning import Tuning
from lazydp.components.shared.frozen_model import FrozenModel

PrivacyUnit = Literal["example", "user"]

FLOATING_POINT = (
    "norms are upper bounds; gradients of table rows are summed exactly, those of dense layers in float64, but for a "
    "unit of one position in a matrix: in float32 within short blocks of units in a random order, whose rounding is "
    "within the clipping norm; a table row is rounded to float32 between its "
    "gradient and its noise by at most 1/128 of what one unit may add to it, or kept in two floats; the bounds are in "
    "docs/floating-point.md; no claim of immunity to attacks on floating-point noise (Mironov 2012)"
)
COUNTS_FLOATING_POINT = "noised counts are rounded to whole numbers"
RANDOM_GENERATOR = "ChaCha20 (RFC 8439 block function), 256-bit key from the operating system, Box-Muller"
START_FLOATING_POINT = (
    "contributions to the start are multiples of 2^-14 whose squares are checked to sum to at most 1, their products "
    "are summed exactly, and noised sums are rounded to a 512th of their noise or coarser"
)
ADD_OR_REMOVE = "add or remove one privacy unit"
MODEL_GUARANTEE = "differential privacy of everything in the bundle"
JOINT_GUARANTEE = (
    "differential privacy of everything in the bundle, and so joint differential privacy of its answers: a person's "
    "own history enters the answers to that person alone, and what all others are told together is covered by epsilon"
)


class SpentElsewhere(FrozenModel):
    """Budget of the same dataset that went to something other than this model."""

    purpose: str
    run_id: str
    epsilon: float = Field(ge=0)


class Family(FrozenModel):
    """The population that the dataset is of, as its operator declared it: nothing proves who is in it."""

    name: str
    declaration: str
    other_people: str = Field(
        default="", description="the operator's words for why these people are in no other family, where it asked"
    )


class AuditResult(FrozenModel):
    """A lower bound on epsilon that an audit of the real training path found."""

    epsilon_lower_bound: float = Field(ge=0)
    confidence: float = Field(gt=0, lt=1)
    method: str


class PopularityRelease(FrozenModel):
    """Noised counts of items in the bundle; every epsilon of the statement covers them."""

    counted: str
    sensitivity: float = Field(gt=0, description="most (L2) by which one privacy unit moves all counts together")
    noise_multiplier: float = Field(gt=0, description="standard deviation of the noise on a count over sensitivity")
    epsilon_without: float | None = Field(ge=0, description="the statement's epsilon, had there been no counts")


class StartRelease(FrozenModel):
    """Noised statistics of histories, from which the weights were computed; every epsilon covers them."""

    released: tuple[str, ...]
    contribution: str = Field(description="what one privacy unit adds to each statistic, of length (L2) at most 1")
    sensitivity: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0, description="of all of it, were it one Gaussian mechanism")
    histogram_noise_multiplier: float = Field(gt=0)
    statistics_noise_multiplier: float = Field(gt=0)


class QualityCheck(FrozenModel):
    """The noised comparison that let the model be released; every epsilon of the statement covers it."""

    metric: str
    over_popularity: float = Field(gt=0, description="least score over that of the released counts")
    sensitivity: float = Field(gt=0, description="most by which one privacy unit moves what was compared")
    noise_multiplier: float = Field(gt=0, description="standard deviation of the noise over sensitivity")


class StepEpsilon(FrozenModel):
    """Epsilon spent after `step` steps."""

    step: int = Field(ge=0)
    epsilon: float = Field(ge=0)


class RealisedNoise(FrozenModel):
    """What the noise of a step changes in released weights, at their precision: measured with noise of another key."""

    elements: int = Field(ge=1, description="weights that were looked at")
    variance: float = Field(ge=0, description="of what the noise changed, over the promised variance: about 1")
    standard_error: float = Field(gt=0, description="of that variance")


class PrivacyStatement(FrozenModel):
    """Everything that docs/design.md, section 3, promises of a release.

    Where `private` is false (no clipping or no noise, or a test key) every epsilon is null: none is claimed.
    """

    private: bool
    why_not_private: str | None = None
    epsilon: float | None = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    accountant: str
    accountant_version: str
    epsilon_rdp: float | None = Field(default=None, description="upper bound by Renyi DP, found by another computation")
    privacy_unit: PrivacyUnit
    max_examples_per_user: int | None = Field(default=None, ge=1)
    neighbouring_relation: str = ADD_OR_REMOVE
    sampler: str
    user_gradient: Literal["sum", "mean"] | None = Field(default=None, description="clipped where users are sampled")
    noise_multiplier: float = Field(ge=0)
    max_grad_norm: float | dict[str, float] | None
    expected_batch_size: float | None = None
    sampling_prob: float = Field(gt=0, le=1)
    steps: int = Field(ge=0)
    epsilon_without_amplification: float | None
    epsilon_user_level: float | None
    epsilon_over_steps: tuple[StepEpsilon, ...] = ()
    popularity: PopularityRelease | None = None
    start: StartRelease | None = None
    minimum_quality: QualityCheck | None = Field(
        default=None, description="what the model had to reach to be released; null where nothing was asked"
    )
    guarantee: str = MODEL_GUARANTEE
    family: Family | None = Field(
        default=None, description="whose budget the release was charged to; null where the dataset declared no family"
    )
    assumed_public: tuple[str, ...]
    not_covered: tuple[str, ...]
    spent_elsewhere: tuple[SpentElsewhere, ...] = ()
    tuning: Tuning | None = Field(
        default=None, description="the sweep that chose the settings; every epsilon covers it"
    )
    random_generator: str = RANDOM_GENERATOR
    test_key: bool = False
    floating_point: str = FLOATING_POINT
    realised_noise: RealisedNoise | None = Field(
        default=None, description="measured at the export on released rows; null in older statements"
    )
    code_version: str
    audit: AuditResult | None = None

    def line(self) -> str:
        """The statement in one line, for a log or the end of a command."""
        if not self.private or self.epsilon is None:
            return f"not private: {self.why_not_private or 'no privacy is claimed'}"
        user = (
            ""
            if self.privacy_unit == "user" or self.epsilon_user_level is None
            else (f"; per user epsilon {self.epsilon_user_level:.4g}")
        )
        return (
            f"epsilon {self.epsilon:.4g} at delta {self.delta:g} per {self.privacy_unit} "
            f"({self.accountant}, {self.neighbouring_relation}){user}"
        )


DEFAULT_PUBLIC = (
    "sampling_prob, expected_batch_size, steps, max_grad_norm and every other setting of the run",
    "the model's architecture, the feature specification and the declared bounds",
    "hashed and declared vocabularies, and the item catalogue",
    "the initial weights",
)
FAMILY_DECLARATION = (
    "every dataset that declares this family draws on one budget; that its people are in no other family is the "
    "operator's declaration"
)
CHOICE_OF_SETTINGS = "the choice of hyper-parameters"
PRIVATE_METRICS = (
    "metrics computed on private data, and what is decided by looking at them: they have no guarantee, so they must "
    "stay inside the organisation"
)
DEFAULT_NOT_COVERED = (
    PRIVATE_METRICS,
    "what an answer of the service reveals about the features in its own request",
    "the fact that two releases were made from the same data: their datasets have equal identifiers if they were, and "
    "different ones if not",
)
