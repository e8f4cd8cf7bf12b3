"""What is known of a run before it spends anything: whether it can end, and what its owner may want to change.

The warnings are computed from private data: they go to the private log, and are to be acted upon with care. Settings
chosen by counting private rows are chosen by private data.
"""

from __future__ import annotations

import logging

import torch

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.build import build_model
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig

_log = logging.getLogger("lazydp.train")
# A batch that is so many times smaller or larger than its divisor says that the divisor is wrong.
_FAR = 2.0
_MUCH_DROPPED = 1 / 3
_OVER_BOUND = "over_max_examples_per_user"


def check_fits(data: EncodedDataset, config: TrainConfig) -> None:
    """Refuse a configuration that asks for what the dataset doesn't have.

    Raises:
        InputError: the message says what to change.
    """
    bound = contribution_bound(data)
    # A start bounds what a user contributes by the length of a row, whatever the number of examples.
    if config.private and config.steps and config.privacy_unit == "user" and bound is None:
        raise InputError(
            f"privacy_unit user needs a bound on the examples of a user, and dataset {data.path} has none: "
            "set max_examples_per_user in the feature spec and ingest again"
        )
    if config.popularity is not None and data.spec.item is None:
        raise InputError(
            f"popularity counts items, and dataset {data.path} has none: leave it out of the configuration"
        )
    if config.start is not None and (data.spec.item is None or data.spec.history is None):
        raise InputError(
            f"a start joins items to the histories of their users, and the feature spec of dataset {data.path} has no "
            "history: add `history: {max_length: 200}` to it and ingest again"
        )
    if config.minimum_quality is not None and len(data.split("test")) == 0:
        raise InputError(
            f"minimum_quality is judged on held-out examples, and dataset {data.path} has none: ingest it with a split"
        )
    if config.sampling == "user" and bound is not None and bound > config.micro_batch_size:
        raise InputError(
            f"micro_batch_size {config.micro_batch_size} is below max_examples_per_user {bound} of {data.path}, "
            f"and sampling user never parts a user's examples: set micro_batch_size to {bound} or more"
        )
    if len(data.split("train")) == 0:
        raise InputError(f"dataset {data.path} has no training examples: look at its split and its rejected rows")
    with torch.device("meta"):
        build_model(data.spec, config.model)


def contribution_bound(data: EncodedDataset) -> int | None:
    """k, the most examples that any user has in training, where ingest enforced one."""
    return data.manifest.max_examples_per_user


def warn_of_settings(data: EncodedDataset, config: TrainConfig) -> None:
    """Log where the batch is far from what the settings say, and where the bound drops a large part of the rows.

    Without steps neither matters: no batch is drawn, and a start reads the whole of a history (unit `user`).
    """
    if config.steps == 0 and config.privacy_unit == "user":
        return
    counts = data.manifest.counts
    units, noun = (counts.users, "users") if config.sampling == "user" else (counts.train, "examples")
    drawn = config.sampling_prob * units
    if config.steps and not 1 / _FAR <= drawn / config.expected_batch_size <= _FAR:
        _log.warning(
            "[private] a batch has about %.4g %s (sampling_prob times what the dataset has), and expected_batch_size "
            "is %g: gradients are %s than meant",
            drawn,
            noun,
            config.expected_batch_size,
            "weaker" if drawn < config.expected_batch_size else "stronger",
        )
    dropped = data.manifest.rejected.get(_OVER_BOUND, 0)
    if dropped > _MUCH_DROPPED * (counts.train + dropped):
        _log.warning(
            "[private] max_examples_per_user %s drops %.0f %% of the training rows (see `lazydp dataset show`)",
            data.manifest.max_examples_per_user,
            100 * dropped / (counts.train + dropped),
        )
