"""Whatever is done to the table behind the ledger's back, `verify` finds it and names the entry."""

import json
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.storage.entries import COLUMNS, Entry, canonical_json, next_entry, true_digest
from lazydp.components.shared.errors import InputError

SHOP, MONTH = "a" * 64, "b" * 64


def gaussian(noise_multiplier: float):
    return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=1)


@pytest.fixture
def full(ledger: Ledger) -> Iterator[Ledger]:
    """Ten entries of every kind."""
    ledger.register_dataset(MONTH, name="month", parents=["shop"])
    ledger.set_budget("month", epsilon=2.0, delta=1e-6, by="officer")
    ledger.reserve(dataset="shop", event=gaussian(8.0), run_id="one")
    ledger.reserve(dataset="month", event=gaussian(9.0), run_id="two")
    ledger.commit("one", event=gaussian(8.5), release="bundle")
    ledger.void("two", by="officer", reason="crashed")
    ledger.charge(dataset="shop", event=gaussian(20.0), run_id="three", purpose="vocabulary")
    return ledger  # type: ignore[return-value]


Tamper = Callable[[str], None]


@pytest.fixture
def tamper(full: Ledger, ledger_url: str) -> Iterator[Tamper]:
    """Run SQL as somebody who may do anything to the database, the guard against changes included."""
    engine = sa.create_engine(ledger_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("DROP TRIGGER lazydp_no_update")
            connection.exec_driver_sql("DROP TRIGGER lazydp_no_delete")
        else:
            connection.exec_driver_sql("DROP TRIGGER lazydp_no_change ON lazydp_entries")

    def run(statement: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)

    yield run
    engine.dispose()


def named(ledger: Ledger, expect_head: str | None = None) -> list[int | None]:
    return [problem.entry for problem in verify(ledger.entries(), expect_head=expect_head).problems]


def test_an_honest_ledger_verifies(full: Ledger) -> None:
    found = verify(full.entries(), expect_head=full.head())
    assert found.problems == ()
    assert found.entries == len(full.entries()) == 10
    assert found.head == full.head()
    assert found.epsilons >= 12


def test_the_database_itself_refuses_changes(full: Ledger, ledger_url: str) -> None:
    engine = sa.create_engine(ledger_url.replace("postgresql://", "postgresql+psycopg://"))
    for statement in ("UPDATE lazydp_entries SET recorded_by = 'x'", "DELETE FROM lazydp_entries WHERE number = 3"):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.exec_driver_sql(statement)
    engine.dispose()
    assert named(full) == []


def test_any_changed_byte_of_any_column_of_any_entry(full: Ledger) -> None:
    """Every byte, one at a time, on what was read: the digest covers all of them."""
    entries = list(full.entries())
    for place, entry in enumerate(entries):
        for column in COLUMNS[1:]:
            text = getattr(entry, column)
            for at in range(len(text)):
                changed = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
                values = {name: getattr(entry, name) for name in COLUMNS} | {column: changed}
                assert true_digest(Entry(**values)) != values["digest"], (place, column, at)


@pytest.mark.parametrize("column", COLUMNS[1:])
def test_a_changed_byte_in_the_database_is_named(full: Ledger, tamper: Tamper, column: str) -> None:
    tamper(f"UPDATE lazydp_entries SET {column} = {column} || ' ' WHERE number = 6")
    assert named(full)[0] == 6


def test_a_changed_number_is_named(full: Ledger, tamper: Tamper) -> None:
    tamper("UPDATE lazydp_entries SET number = 12 WHERE number = 10")
    assert named(full) == [10, 11, 12, None]


@pytest.mark.parametrize("number", [1, 5, 9])
def test_a_removed_entry_is_named(full: Ledger, tamper: Tamper, number: int) -> None:
    tamper(f"DELETE FROM lazydp_entries WHERE number = {number}")
    assert number in named(full)


def test_a_removed_entry_is_named_though_the_rest_was_renumbered(full: Ledger, tamper: Tamper) -> None:
    tamper("DELETE FROM lazydp_entries WHERE number = 5")
    for number in range(6, 11):
        tamper(f"UPDATE lazydp_entries SET number = {number - 1} WHERE number = {number}")
    assert named(full)[0] == 5


def test_the_last_entries_removed_are_named_by_the_head_that_was_kept(full: Ledger, tamper: Tamper) -> None:
    head = full.head()
    tamper("DELETE FROM lazydp_entries WHERE number > 8")
    assert named(full) == []  # nothing in the table can tell: that is what the head is for
    assert named(full, expect_head=head) == [10]


def test_a_swapped_pair_is_named(full: Ledger, tamper: Tamper) -> None:
    for before, after in ((5, 99), (6, 5), (99, 6)):
        tamper(f"UPDATE lazydp_entries SET number = {after} WHERE number = {before}")
    assert {5, 6} <= set(named(full))


def rechained(entries: list[Entry]) -> list[Entry]:
    """What somebody would leave who recomputes every digest after an edit."""
    done: list[Entry] = []
    for entry in entries:
        values = {name: getattr(entry, name) for name in COLUMNS}
        values["previous"] = done[-1].digest if done else entry.previous
        done.append(Entry(**(values | {"digest": true_digest(Entry(**values))})))
    return done


def edited(entries: tuple[Entry, ...], number: int, change: Callable[[dict], None]) -> list[Entry]:
    made = []
    for entry in entries:
        values = {name: getattr(entry, name) for name in COLUMNS}
        if entry.number == number:
            content = json.loads(entry.body)
            change(content)
            values["body"] = canonical_json(content)
        made.append(Entry(**values))
    return made


def test_a_rewritten_epsilon_is_found_though_every_digest_was_recomputed(full: Ledger) -> None:
    def cheaper(content: dict) -> None:
        content["accounts"][SHOP]["epsilon"] /= 2

    found = verify(rechained(edited(full.entries(), 6, cheaper)))
    assert [problem.entry for problem in found.problems] == [6]
    assert "recomputed" in found.problems[0].what


def test_a_rewritten_event_is_found_by_its_epsilon_or_by_the_head(full: Ledger) -> None:
    def quieter(content: dict) -> None:
        content["event"]["noise_multiplier"] = 80.0

    head = full.head()
    forged = rechained(edited(full.entries(), 5, quieter))
    assert 5 in [problem.entry for problem in verify(forged).problems]
    assert 10 in [problem.entry for problem in verify(forged, expect_head=head).problems]


def test_a_reservation_beyond_the_budget_is_found(full: Ledger) -> None:
    def smaller(content: dict) -> None:
        content["epsilon"] = 0.1

    found = verify(rechained(edited(full.entries(), 4, smaller)))  # the budget of `month`
    assert any("beyond the budget" in problem.what for problem in found.problems)


def test_impossible_histories_are_found(full: Ledger) -> None:
    """A ledger forged from nothing, its chain in order: the rules still hold it to account."""
    forged: list[Entry] = []
    for entry in full.entries():
        if entry.kind == "reserved" and entry.run_id == "one":
            continue
        forged.append(
            next_entry(
                forged[-1] if forged else None,
                kind=entry.kind,  # type: ignore[arg-type]
                dataset=entry.dataset,
                run_id=entry.run_id,
                recorded_at=entry.recorded_at,
                recorded_by=entry.recorded_by,
                content=entry.content(),
            )
        )
    assert any("never reserved" in problem.what for problem in verify(forged).problems)


def test_a_head_is_read_strictly(full: Ledger) -> None:
    for wrong in ("10", "x:y", "10:abc"):
        with pytest.raises(InputError, match="NUMBER:DIGEST"):
            verify(full.entries(), expect_head=wrong)
