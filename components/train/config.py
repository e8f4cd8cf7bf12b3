"""The training configuration: everything about a run that is chosen before the data is seen, hence public."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

from lazydp.components.models.config import ModelConfig, TwoTowerConfig
from lazydp.components.onepass.rules import Noise
from lazydp.components.shared.frozen_model import FrozenModel
from lazydp.components.shared.validation import Document, parse_yaml, read_yaml
from lazydp.components.train.distributed_settings import DistributedSettings
from lazydp.components.train.mechanism.parameters import (
    LARGEST_NORM,
    SMALLEST_NORM,
    GroupNorms,
    PrivacyParameters,
    UserGradient,
)
from lazydp.components.train.release_settings import MinimumQuality, PopularityCounts, StartSettings

if TYPE_CHECKING:
    from lazydp.components.train.device.placement import Placement

FORMAT_VERSION = 1

# What a configuration that says nothing but an epsilon stands for.
_DELTA = 1e-5
_HISTORY_MODEL = {"kind": "two_tower", "embedding_dim": 48, "user": "history", "prior": True}
# Without noise more columns say more, in a large catalogue.
_COLUMNS_WITHOUT_NOISE = 512


def _checked_device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"expected cpu, cuda or cuda:N, found {name!r}")
    return name


Mode = Literal["lazydp", "dpsgd", "sgd"]
PrivacyUnit = Literal["example", "user"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Norm = Annotated[float, Field(ge=SMALLEST_NORM, le=LARGEST_NORM, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Device = Annotated[str, AfterValidator(_checked_device)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

# Fields that change how fast or how safely a run goes, never what it computes.
# (Where it computes changes the rounding of sums and nothing else: a run may go on elsewhere.)
_NOT_IN_DIGEST = {"checkpoint_every", "log_every", "device", "table_device"}


class ScheduleSettings(FrozenModel):
    """Learning rate over the steps, known in advance (the skip-ahead table needs no less).

    Attributes:
        kind: `constant`, or after the warm-up a `linear` or `cosine` decay to `final_fraction` at the last step.
        warmup_steps: steps over which the rate grows linearly to its base.
        final_fraction: rate of the last step over the base rate.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: Fraction = 0.0

    def rates(self, learning_rate: float, *, steps: int) -> Callable[[int], float]:
        """Rate of step t = 1..steps."""
        from lazydp.components.train.tables import schedules  # noqa: PLC0415 - brings torch with it

        if self.kind == "cosine":
            make, final_fraction = schedules.warmup_cosine, self.final_fraction
        else:
            make, final_fraction = schedules.linear, 1.0 if self.kind == "constant" else self.final_fraction
        return make(learning_rate, steps=steps, warmup_steps=self.warmup_steps, final_fraction=final_fraction)


class EmbeddingSettings(FrozenModel):
    """SGD of the embedding tables: linear, so that delayed noise stays exact.

    Attributes:
        optimizer: `sgd` only; Adam and Adagrad are not linear in the noise.
        learning_rate: base rate, over the gradient that `expected_batch_size` divides.
        momentum: 0 keeps no velocity table.
        weight_decay: L2, per step times the learning rate.
        schedule: rate over the steps.
    """

    optimizer: Literal["sgd"] = "sgd"
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    schedule: ScheduleSettings = ScheduleSettings()

    @model_validator(mode="before")
    @classmethod
    def _linear_only(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("optimizer", "sgd")).lower() != "sgd":
            raise ValueError(
                f"optimizer {values['optimizer']!r} is not linear in the noise, so a row's delayed noise would not be "
                "exact: embeddings take sgd (with momentum and weight_decay); use it for `dense` instead"
            )
        return values


class DenseSettings(FrozenModel):
    """Optimizer of the dense layers, on the privatised gradient; any is private by post-processing.

    Attributes:
        optimizer: an optimizer of `torch.optim`, by name.
        learning_rate: base rate.
        options: the optimizer's other arguments, for example `{weight_decay: 1.0e-4}`.
        schedule: rate over the steps.
    """

    optimizer: str = "adam"
    learning_rate: Positive = 1e-3
    options: dict[str, bool | int | float | tuple[float, ...]] = Field(default_factory=dict)
    schedule: ScheduleSettings = ScheduleSettings()


class NormSettings(FrozenModel):
    """One clipping norm for each group of parameters; `mechanism.parameters` argues for its accounting.

    Attributes:
        dense: C of the dense layers.
        embeddings: C of the embedding tables.
    """

    dense: Norm
    embeddings: Norm


_ONE, _GROUPS = "(one norm)", "(a norm for each group)"
MaxGradNorm = Annotated[
    Annotated[Norm, Tag(_ONE)] | Annotated[NormSettings, Tag(_GROUPS)],
    Discriminator(lambda value: _GROUPS if isinstance(value, dict | NormSettings) else _ONE),
]


class TrainConfig(FrozenModel):
    """One training run.

    `sampling_prob`, `expected_batch_size` and `steps` are public settings: they are given here, never derived from
    the size of the dataset, which is private. Who leaves all three out gets what needs none of them: a start without
    steps, at a target_delta of 1e-5 where none is given.

    Attributes:
        model: the recommender, with the public seed of its initial weights.
        mode: `lazydp`; `dpsgd`, the same distribution, with noise on every row at every step; `sgd`, neither clipping
            nor noise.
        privacy_unit: whose presence is hidden: a `user`, with all that is the user's (in steps at most k examples), or
            an `example` (one row of the training split).
        sampling: what a step draws, each with probability q: an `example`; or a `user` with all examples, clipped
            together (with privacy_unit user).
        user_gradient: with sampling user, what is clipped: the `sum` or `mean` of the gradients of a user's examples.
        sampling_prob: q, the probability that a step holds a given example (or user).
        expected_batch_size: b, the constant that divides every noised sum; in examples (or users).
        steps: T; 0 for a start that is released as it is.
        noise_multiplier: sigma; or
        target_epsilon: epsilon from which sigma is calibrated, together with target_delta.
        target_delta: delta of every figure of epsilon.
        max_grad_norm: C, or one for each group of parameters: `{dense: 0.5, embeddings: 1.0}`.
        popularity: counts of items to release with the model, at a cost that every epsilon of the run covers; None for
            none.
        start: what is released of the histories before the first step; None for weights of the public seed.
        minimum_quality: what the model must reach to be released, at a cost that every epsilon covers; None for
            nothing.
        negatives: uniform negatives an example is trained against (implicit feedback).
        embeddings: optimizer of the tables.
        dense: optimizer of the dense layers.
        micro_batch_size: most examples in memory at once; larger batches are summed from parts. A user's examples are
            never parted, so with sampling user it is at least the dataset's max_examples_per_user.
        publish_every: steps between snapshots that are released while training goes on; None for none. Part of what
            the run computes: a snapshot flushes the tables.
        checkpoint_every: steps between checkpoints.
        log_every: steps between log lines.
        device: where the dense layers compute: `cpu`, `cuda` or `cuda:N`.
        table_device: where the tables live: with the dense layers (None), or in host memory (`cpu`). Like `device` it
            changes no part of the mechanism; the same run on another device ends in other bits, drawn from the same
            distribution.
        distributed: how the run is laid out for several processes (ranks); None for a run of one process.
    """

    format_version: Literal[1] = 1
    model: ModelConfig
    mode: Mode = "lazydp"
    privacy_unit: PrivacyUnit = "user"
    sampling: Literal["example", "user"] = "example"
    user_gradient: UserGradient | None = None
    sampling_prob: Annotated[float, Field(gt=0, le=1)]
    expected_batch_size: Positive
    steps: Annotated[int, Field(ge=0)]
    noise_multiplier: Positive | None = None
    target_epsilon: Positive | None = None
    target_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_grad_norm: MaxGradNorm = 1.0
    popularity: PopularityCounts | None = None
    start: StartSettings | None = None
    minimum_quality: MinimumQuality | None = None
    negatives: PositiveInt = 8
    embeddings: EmbeddingSettings = EmbeddingSettings()
    dense: DenseSettings = DenseSettings()
    micro_batch_size: PositiveInt = 4096
    publish_every: PositiveInt | None = None
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 100
    device: Device = "cpu"
    table_device: Device | None = None
    distributed: DistributedSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_steps(cls, values: Any) -> Any:
        """Fill in what a run without steps leaves open; see the class."""
        if not isinstance(values, dict):
            return values
        drawn = {"steps", "sampling_prob", "expected_batch_size"}
        if values.get("steps", None if drawn & values.keys() else 0) != 0:
            return values
        unused = {"steps": 0, "sampling_prob": 1.0, "expected_batch_size": 1.0}
        if values.get("mode") == "sgd":
            other: dict[str, Any] = {"model": {**_HISTORY_MODEL, "embedding_dim": _COLUMNS_WITHOUT_NOISE}}
        else:
            other = {"model": _HISTORY_MODEL, "target_delta": _DELTA}
        return {"start": {}, "privacy_unit": "user", **unused, **other, **values}

    @model_validator(mode="after")
    def _start_fits_the_model(self) -> Self:
        model = self.model
        has_prior = isinstance(model, TwoTowerConfig) and model.prior
        if self.start is None:
            if self.steps == 0:
                raise ValueError("steps: 0 trains nothing: give `start: {}` for a model that needs no steps, or steps")
            if has_prior and self.popularity is None and self.private:
                raise ValueError("model.prior needs counts: give `popularity: {noise_multiplier: 20}`, or a start")
            return self
        if not (has_prior and isinstance(model, TwoTowerConfig) and model.user == "history"):
            raise ValueError(
                "start makes item vectors for a model of histories: give "
                "`model: {kind: two_tower, user: history, prior: true}`"
            )
        if self.popularity is not None:
            raise ValueError("popularity: a start releases counts itself; leave one of the two out")
        if self.steps == 0 and self.start.noise_multiplier is not None:
            raise ValueError("start.noise_multiplier: without steps it is the run's noise_multiplier; leave it out")
        if self.steps and self.private and self.start.noise_multiplier is None:
            raise ValueError("start.noise_multiplier is missing: how much of the budget is the start's?")
        return self

    @model_validator(mode="after")
    def _privacy_is_stated(self) -> Self:
        if self.mode == "sgd":
            if self.publish_every is not None:
                raise ValueError("publish_every: snapshots of a run without privacy are not released")
            if self.popularity is not None:
                raise ValueError("popularity: a run without privacy releases no counts; leave it out with mode sgd")
            if self.minimum_quality is not None:
                raise ValueError("minimum_quality: a run without privacy is no release; leave it out with mode sgd")
            return self
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("give one of noise_multiplier and target_epsilon (or mode: sgd, which has no privacy)")
        if self.target_delta is None:
            raise ValueError("target_delta is missing: every epsilon is stated at a delta, for example 1.0e-5")
        return self

    @model_validator(mode="after")
    def _quality_can_be_judged(self) -> Self:
        if self.minimum_quality is None:
            return self
        if self.popularity is None and self.start is None:
            raise ValueError(
                "minimum_quality compares the model with counts that are released, and this run releases none: give "
                "`popularity: {noise_multiplier: 20}` as well"
            )
        if self.publish_every is not None:
            raise ValueError("minimum_quality judges the finished model, and publish_every releases earlier ones")
        return self

    @model_validator(mode="after")
    def _sampling_fits_the_unit(self) -> Self:
        if self.sampling == "user" and self.privacy_unit != "user":
            raise ValueError("sampling: user clips all examples of a user together: say privacy_unit: user as well")
        if self.sampling == "user" and self.user_gradient is None:
            raise ValueError(
                "user_gradient is missing: is it the sum or the mean of a user's gradients that is clipped?"
            )
        if self.sampling == "example" and self.user_gradient is not None:
            raise ValueError("user_gradient belongs to sampling: user; sampled examples are clipped one by one")
        return self

    @model_validator(mode="after")
    def _devices_go_together(self) -> Self:
        if self.table_device not in (None, "cpu", self.device):
            raise ValueError(
                f"table_device: tables live with the dense layers or in host memory: expected {self.device} or cpu, "
                f"found {self.table_device}"
            )
        return self

    @model_validator(mode="after")
    def _can_be_distributed(self) -> Self:
        if self.distributed is None:
            return self
        refused = {
            "mode: sgd": not self.private and "sums without clipping are float32, and depend on the number of ranks",
            "device": self.device != "cpu" and "ranks send each other what lies in host memory: use device: cpu",
            "start": self.start is not None and "its vectors are computed in one process, as one table",
            "publish_every": self.publish_every is not None and "a snapshot needs all rows in one process",
            "steps: 0": self.steps == 0 and "there is nothing to divide among ranks",
        }
        for setting, reason in refused.items():
            if reason:
                raise ValueError(f"distributed does not go with {setting}: {reason}")
        return self

    @property
    def lanes(self) -> int:
        """Slices of a batch that are computed apart."""
        return 1 if self.distributed is None else self.distributed.lanes

    @property
    def arrangement(self) -> Literal["spread", "ordered"]:
        """Where the rows of the tables lie."""
        return "ordered" if self.distributed is None else self.distributed.placement

    @property
    def private(self) -> bool:
        """Whether the run clips and adds noise."""
        return self.mode != "sgd"

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read a YAML file.

        Raises:
            InputError: missing, not YAML, or not valid; one line that names the file and the field.
        """
        return read_yaml(path, what="training configuration").validated(cls)

    @classmethod
    def parse_text(cls, text: str, *, where: str) -> TrainConfig:
        """Read YAML text; errors are one line that names `where`."""
        return parse_yaml(text, where=where).validated(cls)

    @classmethod
    def parse(cls, document: dict[str, Any], *, where: str) -> TrainConfig:
        """Validate a mapping; errors are one line that begins with `where`."""
        return Document(f"training configuration {where}", document).validated(cls)

    def with_changes(self, **changes: Any) -> TrainConfig:
        """The same run with some settings replaced, validated again.

        To change the mode to sgd leaves out the counts and the check of quality: without privacy nothing is released.
        """
        if changes.get("mode") == "sgd":
            changes = {"popularity": None, "minimum_quality": None, **changes}
        return self.parse({**self.model_dump(), **changes}, where="(with the command line's options)")

    def digest(self) -> str:
        """SHA-256 of every setting that has a part in the result."""
        return hashlib.sha256(json.dumps(self._deciding(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: TrainConfig) -> list[str]:
        """`setting: ours != theirs` for every setting that has a part in the result."""
        ours, theirs = _flatten(self._deciding()), _flatten(other._deciding())
        return [
            f"{name}: {ours.get(name)!r} != {theirs.get(name)!r}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]

    def _deciding(self) -> dict[str, Any]:
        """Every setting that has a part in the result, as JSON values."""
        # What is left out keeps a configuration the digest that it had before there was any of it.
        absent = {
            name for name in ("popularity", "start", "minimum_quality", "distributed") if getattr(self, name) is None
        }
        deciding = self.model_dump(mode="json", exclude=_NOT_IN_DIGEST | absent)
        for name, default in (("user", "features"), ("prior", False)):
            if deciding["model"].get(name) == default:
                del deciding["model"][name]
        return deciding

    def start_noise(self, noise_multiplier: float | None) -> Noise | None:
        """The noise of the start, with the sigma of the run (None without noise); None where there is no start."""
        if self.start is None:
            return None
        sigma = self.start.noise_multiplier if self.steps else noise_multiplier
        return Noise.of(sigma or 0.0 if self.private else 0.0, histogram_share=self.start.histogram_share)

    def stated_norms(self) -> float | dict[str, float]:
        """C, or C by group of parameters, as statements and reports give it."""
        norms = self.max_grad_norm
        return norms.model_dump() if isinstance(norms, NormSettings) else norms

    def placement(self) -> Placement:
        """Where the run computes.

        Raises:
            UnavailableError: it asks for a GPU, and there is none.
        """
        from lazydp.components.train.device.placement import Placement  # noqa: PLC0415 - brings torch with it

        return Placement.of(self.device, self.table_device)

    def privacy_parameters(self, noise_multiplier: float | None) -> PrivacyParameters:
        """The mechanism of a step, with the sigma of the run (None without noise)."""
        norms = self.max_grad_norm
        return PrivacyParameters(
            noise_multiplier=noise_multiplier or 0.0,
            max_grad_norm=GroupNorms(**norms.model_dump()) if isinstance(norms, NormSettings) else norms,
            expected_batch_size=self.expected_batch_size,
            user_gradient=self.user_gradient,
        )


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
