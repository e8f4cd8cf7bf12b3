"""Requests as batches: what the service is asked, encoded the way ingest encoded the training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lazydp.components.features.batch import Bags, Batch
from lazydp.components.features.encode import encode_list, pick, scale_dense
from lazydp.components.features.spec import HISTORY, ITEM, USER, FeatureSpec, ListFeature
from lazydp.components.features.vocabulary import Codes, Vocabularies
from lazydp.components.shared.errors import InputError


def encode_requests(
    spec: FeatureSpec,
    vocabularies: Vocabularies,
    *,
    users: Sequence[str | int | None],
    histories: Sequence[Sequence[str | int]],
    features: Sequence[Mapping[str, Any]] | None = None,
) -> Batch:
    """Encode B questions as a batch without items and with zero labels.

    Args:
        spec: the spec of the training data.
        vocabularies: its vocabularies.
        users: B user ids, None where the user is not named; an unknown one has code 0.
        histories: B lists of item ids, oldest first; unknown items are left out, the latest `max_length` count.
        features: B mappings of user and context feature names to values; what is left out is missing.

    Raises:
        InputError: lengths differ, or a value of the wrong kind; the message names the feature.
    """
    records = list(features) if features is not None else [{} for _ in users]
    if not len(users) == len(histories) == len(records):
        raise InputError(f"expected as many histories and features as users, found {len(users)} users")
    bags: dict[str, Bags] = {}
    if spec.user is not None and spec.user.embed:
        bags[USER] = Bags.single(torch.from_numpy(vocabularies[USER].encode(list(users))))
    for feature in spec.embedded("user", "context"):
        vocabulary = vocabularies[feature.table_name]
        values = pick(records, feature.name)
        try:
            if isinstance(feature, ListFeature):
                lists = encode_list(feature, vocabulary, values)
                bags[feature.name] = _bags(lists.values, lists.lengths)
            else:
                bags[feature.name] = Bags.single(torch.from_numpy(vocabulary.encode(values)))
        except (ValueError, TypeError) as error:
            raise InputError(f"feature {feature.name!r}: {error}") from None
    if spec.history is not None:
        bags[HISTORY] = _history_bags(spec, vocabularies, histories)
    return Batch(
        size=len(users),
        labels=torch.zeros(len(users)),
        dense=_dense(spec, records),
        bags=bags,
        item=None,
        user_index=None,
    )


def _bags(values: Codes, lengths: Codes) -> Bags:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Bags(torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(offsets))


def _history_bags(spec: FeatureSpec, vocabularies: Vocabularies, histories: Sequence[Sequence[str | int]]) -> Bags:
    assert spec.history is not None
    flat = vocabularies[ITEM].encode([item for history in histories for item in history])
    ends = np.cumsum([len(history) for history in histories], dtype=np.int64)
    known = [part[part > 0][-spec.history.max_length :] for part in np.split(flat, ends[:-1])] if histories else []
    lengths = np.asarray([len(part) for part in known], dtype=np.int64)
    return _bags(np.concatenate(known) if known else np.empty(0, np.int64), lengths)


def _dense(spec: FeatureSpec, records: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    dense = np.zeros((len(records), spec.num_dense), dtype=np.float32)
    for column, feature in enumerate(spec.dense("user", "context")):
        try:
            dense[:, column] = scale_dense(feature, pick(records, feature.name))
        except (ValueError, TypeError) as error:
            raise InputError(f"feature {feature.name!r}: {error}") from None
    return torch.from_numpy(dense)
