"""One batch of the users table: its features encoded, for the rows of the interactions to be joined with."""

from __future__ import annotations

import pyarrow as pa

from lazydp.components.features.spec import FeatureSpec
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.ingest.hashing import Words, hash_texts
from lazydp.components.ingest.rows import HASH_COLUMN, USER_COLUMN, encode_features, hash_rows, text_of
from lazydp.kernels.rows import chain, sums


def user_columns(spec: FeatureSpec) -> list[str]:
    """The columns of the users table that the spec uses, its key first; none where it has no feature of users."""
    wanted = [feature.column_name for feature in spec.features if feature.source == "user"]
    if spec.users is None or not wanted:
        return []
    return list(dict.fromkeys([spec.users.key, *wanted]))


def encode_users(spec: FeatureSpec, vocabularies: Vocabularies, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Words]:
    """The rows of a batch that name a user, as `user`, `hash` of the features and `feature:<name>`.

    Returns:
        The rows, and the hash of each row's user.

    Raises:
        InputError: a column of the wrong kind.
    """
    assert spec.users is not None
    columns = {USER_COLUMN: text_of(batch.column(spec.users.key), spec.users.key, "users.key")}
    rows = pa.record_batch(columns | encode_features(spec, vocabularies, batch, "user"))
    rows = rows.filter(rows.column(USER_COLUMN).is_valid())
    rows = rows.append_column(HASH_COLUMN, pa.array(hash_rows(rows)))
    return rows, hash_texts(rows.column(USER_COLUMN))


def sums_of_users(rows: pa.RecordBatch, hashes: Words) -> tuple[int, int]:
    """What tells users tables apart: sums over the hashes of the rows with their users; changes `hashes`."""
    chain(hashes, rows.column(HASH_COLUMN).to_numpy())
    return sums(hashes)
