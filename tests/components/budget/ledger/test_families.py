"""Datasets of one declared family draw on one budget, and people who look known get no second one without words."""

from pathlib import Path
from typing import Any

import pytest
from dp_accounting import dp_event

from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.report.overview import LedgerOverview
from lazydp.components.budget.report.report import report
from lazydp.components.shared.errors import BudgetExceededError, PrivacyError

EVENT = dp_event.GaussianDpEvent(10.0)  # epsilon 0.39 at delta 1e-5; two of them 0.57
SETTINGS = {"epsilon": 0.45, "delta": 1e-5}


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as opened:
        yield opened


def known(ledger: Ledger, fingerprint: str, **more: Any) -> str:
    given = {"name": "shop", "sources": [f"log of {fingerprint}"], "default_family": "shop"}
    return register(ledger, fingerprint=fingerprint, **{**given, **more}).identifier


def test_a_nightly_dataset_draws_on_the_budget_of_its_family(ledger: Ledger) -> None:
    monday = known(ledger, "monday")
    ledger.set_budget(monday, **SETTINGS, by="officer")  # type: ignore[arg-type]
    ledger.reserve(dataset=monday, event=EVENT, run_id="monday")
    tuesday = known(ledger, "tuesday, one row more")
    assert tuesday != monday
    shown = ledger.show(tuesday)
    assert (shown.epsilon, shown.declared_family) == (0.45, "shop")
    assert shown.charged_epsilon == ledger.show(monday).charged_epsilon > 0
    with pytest.raises(BudgetExceededError):
        ledger.reserve(dataset=tuesday, event=EVENT, run_id="tuesday")
    # What is set on any of them is set on the family; and it is one row in the table.
    ledger.set_budget(tuesday, epsilon=0.7, delta=1e-5, by="officer", reason="review 12")
    assert ledger.show(monday).epsilon == 0.7
    held = ledger.reserve(dataset=tuesday, event=EVENT, run_id="tuesday")
    assert held.charged_epsilon > ledger.state().runs["monday"].epsilon
    assert [budget.dataset for budget in ledger.budgets()] == [monday]
    assert ledger.show("shop").dataset == monday
    ledger.commit("tuesday", event=EVENT, release="bundle")
    assert not verify(ledger.entries()).problems
    page = report(LedgerOverview.of(ledger.entries(), verify(ledger.entries())), source="here")
    assert "<dt>Family</dt>\n      <dd>shop, as declared" in page
    assert page.count(">Budget of shop</h2>") == 1


def test_three_hundred_nights_are_one_account(ledger: Ledger) -> None:
    ledger.set_budget(known(ledger, "night 0"), epsilon=8.0, delta=1e-5, by="officer")
    for night in range(1, 6):
        ledger.reserve(dataset=known(ledger, f"night {night}"), event=EVENT, run_id=f"run {night}")
    assert len(ledger.entries()[-1].content()["accounts"]) == 1


@pytest.mark.parametrize(
    ("more", "common"),
    [
        ({"name": "shop", "family": "other"}, "name"),
        ({"name": "other", "family": "other", "user_column": "customer"}, "user column"),
        ({"name": "other", "family": "other", "places": ["s3://lake/clicks.parquet"]}, "source"),
        ({"name": "other", "default_family": "", "user_column": "customer"}, "user column"),
        ({"name": "shop", "default_family": ""}, "name"),
        ({"name": "other", "family": "other", "user_column": "customer", "places": ["x"]}, "user column"),
    ],
)
def test_people_who_look_known_need_words(ledger: Ledger, more: dict[str, Any], common: str) -> None:
    before = known(ledger, "first", user_column="customer", places=["s3://lake/clicks.parquet"])
    ledger.set_budget(before, **SETTINGS, by="officer")  # type: ignore[arg-type]
    fresh = known(ledger, "fresh", **more)
    with pytest.raises(
        PrivacyError, match=rf"looks like people who have a budget there: family shop \(same .*{common}"
    ):
        ledger.set_budget(fresh, **SETTINGS, by="officer")  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="has no budget"):
        ledger.reserve(dataset=fresh, event=EVENT, run_id="fresh")
    with pytest.raises(PrivacyError, match="looks like"):
        ledger.set_budget(fresh, **SETTINGS, by="officer", other_people="  ")  # type: ignore[arg-type]
    words = "customers of the subsidiary in Peru, none of whom buys here"
    assert ledger.set_budget(fresh, **SETTINGS, by="officer", other_people=words).other_people == words  # type: ignore[arg-type]
    assert ledger.entries()[-1].content()["other_people"] == words
    ledger.reserve(dataset=fresh, event=EVENT, run_id="fresh")
    assert ledger.show(before).charged_epsilon == 0
    # A later change of the budget asks for nothing and keeps the words.
    assert ledger.set_budget(fresh, epsilon=0.4, delta=1e-5, by="officer").other_people == words
    assert not verify(ledger.entries()).problems


def test_people_who_look_like_nobody_need_none(ledger: Ledger) -> None:
    ledger.set_budget(known(ledger, "first", user_column="customer", places=["a"]), **SETTINGS, by="officer")  # type: ignore[arg-type]
    other = known(ledger, "second", name="films", default_family="films", user_column="viewer", places=["b"])
    ledger.set_budget(other, **SETTINGS, by="officer")  # type: ignore[arg-type]
    ledger.reserve(dataset=other, event=EVENT, run_id="films")


def test_the_same_rows_keep_their_family(ledger: Ledger) -> None:
    first = known(ledger, "rows")
    with pytest.raises(PrivacyError, match="belongs to family shop, and fresh was declared"):
        known(ledger, "rows", family="fresh")
    assert known(ledger, "rows", name="renamed", default_family="renamed") == first
    assert ledger.state().datasets[first].family == "shop"


def test_a_dataset_without_family_is_one_of_its_own(ledger: Ledger) -> None:
    """What an older lazydp wrote: found again by its identifier, and joined to a family when somebody says so."""
    old = known(ledger, "old rows", default_family="")
    ledger.set_budget(old, **SETTINGS, by="officer")  # type: ignore[arg-type]
    ledger.reserve(dataset=old, event=EVENT, run_id="old")
    assert known(ledger, "old rows", default_family="") == old
    nightly = known(ledger, "old rows and one more")
    assert ledger.show(nightly).epsilon is None
    with pytest.raises(PrivacyError, match=r"looks like people who have a budget there: dataset shop"):
        ledger.set_budget(nightly, **SETTINGS, by="officer")  # type: ignore[arg-type]
    ledger.register_dataset(old, name="shop", family="shop")
    assert ledger.show(nightly).epsilon == 0.45
    with pytest.raises(BudgetExceededError):
        ledger.reserve(dataset=nightly, event=EVENT, run_id="new")


def test_families_that_had_budgets_keep_both_when_they_become_one(ledger: Ledger) -> None:
    one = known(ledger, "one", name="one", default_family="")
    two = known(ledger, "two", name="two", default_family="")
    ledger.set_budget(one, epsilon=5.0, delta=1e-5, by="officer")
    ledger.set_budget(two, **SETTINGS, by="officer")  # type: ignore[arg-type]
    ledger.reserve(dataset=one, event=EVENT, run_id="one")
    for identifier, name in ((one, "one"), (two, "two")):
        ledger.register_dataset(identifier, name=name, family="all")
    # The smaller budget counts what was spent on the other, and refuses.
    with pytest.raises(BudgetExceededError, match="dataset two"):
        ledger.reserve(dataset=one, event=EVENT, run_id="more")
    assert not verify(ledger.entries()).problems


def test_columns_and_places_stand_under_keyed_identifiers(ledger: Ledger, tmp_path: Path) -> None:
    known(ledger, "rows", user_column="patient_number", places=["/clinic/oncology.parquet"])
    published = b"".join(path.read_bytes() for path in tmp_path.glob("ledger.db*") if not path.name.endswith("secret"))
    assert b"shop" in published
    for private in (b"patient_number", b"oncology"):
        assert private not in published
