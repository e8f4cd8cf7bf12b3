"""What a sweep tries: the number of trials, the settings that each draws, and what they are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from lazydp.components.budget.accounting.tuning import Metric, TrialDistribution
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.frozen_model import FrozenModel
from lazydp.components.shared.validation import parse_yaml, read_yaml
from lazydp.components.train.config import TrainConfig


class HeldOut(FrozenModel):
    """Score on the dataset's own held-out split: the sum over users of scores in [0, 1], noised.

    Attributes:
        noise_multiplier: standard deviation of that noise. The sum grows with the users and its noise does not: 20 is
            0.02 of a score's mean over 1,000 users, and costs less privacy than most trainings.
    """

    kind: Literal["held_out"]
    noise_multiplier: Annotated[float, Field(ge=0)]


class Public(FrozenModel):
    """Score on another dataset, which is declared public.

    Attributes:
        dataset: the folder that `lazydp ingest` made of it, with the same feature spec.
    """

    kind: Literal["public"]
    dataset: Path


class Sweep(FrozenModel):
    """What to try.

    Attributes:
        distribution: of the number of trials. The name of this setting in lazydp 0.1, `law`, is read too.
        mean_trials: its mean.
        metric: what the trials are compared by.
        score: on what.
        settings: dotted name of a setting of the training configuration -> values, of which each trial draws one.
    """

    format_version: Literal[1] = 1
    distribution: Annotated[TrialDistribution, Field(validation_alias=AliasChoices("distribution", "law"))] = "poisson"
    mean_trials: Annotated[float, Field(ge=1, le=10_000)]
    metric: Metric = "ndcg_at_10"
    score: Annotated[HeldOut | Public, Field(discriminator="kind")]
    settings: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]

    @classmethod
    def load(cls, path: Path) -> Sweep:
        """Read a YAML file.

        Raises:
            InputError: it cannot be read or is not valid; one line that names the file and the field.
        """
        return read_yaml(path, what="sweep").validated(cls)

    @classmethod
    def parse_text(cls, text: str, *, where: str) -> Sweep:
        """Read YAML text; errors are one line that names `where`."""
        return parse_yaml(text, where=where).validated(cls)


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`config` with settings replaced, each by its dotted name.

    Raises:
        InputError: an unknown setting, or a value that is not valid.
    """
    document = config.model_dump()
    for name, value in settings.items():
        node: dict[str, Any] = document
        *path, last = name.split(".")
        for part in path:
            inner = node.get(part)
            node = inner if isinstance(inner, dict) else {}
        if last not in node:
            raise InputError(f"settings: the training configuration has no setting {name!r}")
        node[last] = value
    return TrainConfig.parse(document, where="(with the settings of the sweep)")
