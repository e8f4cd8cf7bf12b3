"""What a column is taken for, by its name alone."""

from __future__ import annotations

import pytest

from lazydp.components.ingest.column_roles import Role, column_for, is_free_text, same_name
from lazydp.components.shared.errors import InputError

FOUND: dict[tuple[Role, tuple[str, ...]], str | None] = {
    ("user", ("user_id", "item_id")): "user_id",
    ("user", ("userId", "movieId")): "userId",
    ("user", ("USERID", "x")): "USERID",
    ("user", ("Viewer No.", "Film-ID")): "Viewer No.",
    ("user", ("customer number", "user agent")): "customer number",
    ("user", ("user_name", "user_id")): "user_id",
    ("user", ("user", "user_key")): "user_key",
    ("user", ("app_user_id", "app")): "app_user_id",
    ("user", ("a", "b")): None,
    ("user", ("reviewerID", "asin")): "reviewerID",
    ("item", ("sku code", "product_name")): "sku code",
    ("item", ("visitorid", "itemid")): "itemid",
    ("item", ("business_id", "stars")): "business_id",
    ("time", ("ts_ms", "watch_time")): "ts_ms",
    ("time", ("Rated At",)): "Rated At",
    ("time", ("event_time", "timestamp")): "timestamp",
    ("time", ("eventTime",)): "eventTime",
    ("time", ("birth_date", "play time")): None,
    ("time", ("unixReviewTime",)): "unixReviewTime",
    ("time", ("timestamp (UTC)",)): "timestamp (UTC)",
    ("title", ("brand name", "Film Title")): "Film Title",
    ("title", ("brand_name", "category name")): None,
    ("title", ("productName",)): "productName",
    ("title", ("original_title", "title")): "title",
    ("rating", ("Stars (1-5)",)): "Stars (1-5)",
    ("rating", ("overall",)): None,
}


@pytest.mark.parametrize(("role", "columns", "found"), [(*key, found) for key, found in FOUND.items()])
def test_a_column_is_found_by_its_name(role: Role, columns: tuple[str, ...], found: str | None) -> None:
    assert column_for(columns, role) == found


@pytest.mark.parametrize(
    ("role", "columns"), [("user", ("from_user_id", "to_user_id")), ("time", ("created_at", "updated_at"))]
)
def test_two_columns_that_are_as_likely_are_asked_about(role: Role, columns: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=f"each be the {role}: name one by --{role}"):
        column_for(columns, role)


def test_names_that_differ_in_marks_are_the_same() -> None:
    assert same_name(["SKU code", "name"], "skuCode") == "SKU code"
    assert same_name(["sku", "SKU"], "SKU") == "SKU"
    assert same_name(["a"], "b") is None
    assert same_name(["名"], "前") is None


def test_texts_of_their_own_are_known_by_name() -> None:
    assert is_free_text("Image URL")
    assert not is_free_text("genre")
