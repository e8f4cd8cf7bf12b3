"""What callers of a ledger are told right after a decision is what the next reader finds."""

import sqlite3
from pathlib import Path

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.storage.base import sqlite_path


def gaussian(noise_multiplier: float):
    return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=1)


def test_a_dataset_without_a_budget_has_spent_nothing(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        shown = ledger.show("shop")
        assert (shown.charged_epsilon, shown.committed_epsilon, shown.reserved_epsilon) == (0.0, 0.0, 0.0)
        assert (shown.epsilon, shown.delta, shown.privacy_unit, shown.remaining_epsilon) == (None,) * 4
        assert (shown.set_by, shown.reason, shown.reserved_runs, shown.committed_runs) == ("", "", 0, 0)


def test_a_decision_answers_what_a_reader_finds(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        told = ledger.set_budget("shop", epsilon=3.0, delta=1e-5)
        assert told == ledger.show("shop")
        assert told.updated_at is not None
        ledger.reserve(dataset="shop", event=gaussian(9.0), run_id="one")
        told = ledger.set_budget("shop", epsilon=4.0, delta=1e-5, by="officer", reason="review")
        assert told == ledger.show("shop")
        assert told.charged_epsilon + told.remaining_epsilon == 4.0  # type: ignore[operator]


def test_the_same_noise_may_be_released_twice_and_no_less_than_before(sqlite_url: str) -> None:
    """The second release spends exactly what the first did: that is no earlier snapshot."""
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        ledger.set_budget("shop", epsilon=3.0, delta=1e-5)
        ledger.reserve(dataset="shop", event=gaussian(8.0), run_id="one", key="k")
        ledger.commit("one", event=gaussian(8.5), release="x", step=1, final=False, key="k")
        ledger.commit("one", event=gaussian(8.5), release="y", step=1, final=True, key="k")
        assert [entry.kind for entry in ledger.entries() if entry.run_id == "one"][1:] == ["committed", "committed"]


def test_a_file_has_a_write_ahead_log(sqlite_url: str) -> None:
    """So that readers do not wait for a writer."""
    Ledger.open(sqlite_url).close()
    with sqlite3.connect(Path(sqlite_path(sqlite_url) or "")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
