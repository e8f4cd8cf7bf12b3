"""Why an answer is not about the person who asked."""

from types import SimpleNamespace
from typing import Any

import pytest

from lazydp.components.bundle.query import Query
from lazydp.components.bundle.scoring.base import Scorer


@pytest.mark.parametrize(
    ("query", "reads", "reason"),
    [
        ({"user_id": "u"}, (True, True), "the model does not know this user, and no history was given"),
        ({"user_id": "u"}, (False, True), "the model knows nobody by id, and no history was given"),
        ({"history": ("a",)}, (False, True), "the model knows none of the items of the history"),
        ({"history": ("a",)}, (False, False), "the model reads no history"),
        (
            {"history": ("a",), "user_id": "u"},
            (True, True),
            "the model knows none of the items of the history and does not know this user",
        ),
        ({}, (True, True), "nothing was said about the person: neither a user id nor a history"),
    ],
)
def test_why_nobody_is_known(query: dict[str, Any], reads: tuple[bool, bool], reason: str) -> None:
    encoder = SimpleNamespace(reads_users=reads[0], reads_history=reads[1])
    assert Scorer._why_unknown(SimpleNamespace(encoder=encoder), Query(**query)) == reason  # type: ignore[arg-type]
