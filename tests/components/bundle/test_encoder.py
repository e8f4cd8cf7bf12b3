"""Queries are encoded as ingest encodes rows, whatever vocabulary users have."""

from pathlib import Path
from typing import Any

import pytest

from lazydp.components.bundle.encoder import QueryEncoder
from lazydp.components.bundle.query import Query
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.untrained import feature_spec, write_untrained
from lazydp.components.features.spec import USER

USERS: dict[str, dict[str, Any]] = {
    "hashed": {"kind": "hashed", "buckets": 64, "salt": "shop"},
    "integers from 1": {"kind": "integer", "size": 50, "first": 1},
    "integers from 5": {"kind": "integer", "size": 50, "first": 5},
    "declared": {"kind": "declared", "values": ["7", "ann", "bob", "007"]},
    "buckets": {"kind": "buckets", "boundaries": [0, 5, 50]},
}
# Among them what looks like another: signs, leading zeros, spaces, another script, and the ends of every range.
IDS = [
    "0",
    "1",
    "4",
    "5",
    "7",
    "007",
    "49",
    "50",
    "51",
    "54",
    "55",
    "-1",
    "+7",
    " 7",
    "7.0",
    "ann",
    "bob",
    "Ann",
    "٧",
    "",
]


@pytest.mark.parametrize("kind", USERS)
def test_a_user_has_the_code_that_ingest_gives(kind: str, tmp_path: Path) -> None:
    spec = feature_spec(num_users=50, num_items=30, user={"column": "user", "vocabulary": USERS[kind]})
    write_untrained(tmp_path / "bundle", num_items=30, spec=spec)
    bundle = Bundle.open(tmp_path / "bundle", allow_test_key=True)
    encoder = QueryEncoder(bundle)
    expected = [int(code) for code in bundle.vocabularies[USER].encode(IDS)]
    assert [encoder.user_code(name) for name in IDS] == expected
    assert len(set(expected)) > 3
    assert encoder.user_code(None) == 0
    bags = encoder.encode([Query(user_id=name) for name in IDS]).bags
    # An unknown user is an empty bag.
    assert bags[USER].values.tolist() == [code for code in expected if code]
