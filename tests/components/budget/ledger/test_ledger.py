"""The ledger's rules, on both databases."""

import math
import time
from dataclasses import asdict

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from lazydp.components.budget.accounting import loss_store
from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import (
    composed,
    dpsgd_event,
    event_to_json,
    tuning_event,
    user_level_event,
)
from lazydp.components.budget.ledger.charges import account_of
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.state import LedgerState
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.storage.entries import Entry, Kind, next_entry
from lazydp.components.shared.errors import BudgetExceededError, FormatError, InputError, PrivacyError, UnavailableError

IDENTIFIER = "a" * 64  # of the dataset that the `ledger` fixture knows
OTHER = "b" * 64
THIRD = "c" * 64


def gaussian(noise_multiplier: float = 10.0, *, steps: int = 1) -> dp_event.DpEvent:
    """A mechanism whose epsilon is quick to find."""
    return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=steps)


def reserve(ledger: Ledger, run_id: str, event: dp_event.DpEvent, dataset: str = "shop", **more: str):
    return ledger.reserve(dataset=dataset, event=event, run_id=run_id, **more)


def test_reserve_and_commit(ledger: Ledger) -> None:
    event = dpsgd_event(noise_multiplier=1.0, sampling_prob=0.01, steps=1000)
    held = reserve(ledger, "one", event, config_digest="c")
    assert held.epsilon == pytest.approx(1.828, abs=1e-3)
    assert held.charged_epsilon == held.epsilon
    shown = ledger.show("shop")
    assert (shown.reserved_runs, shown.committed_runs, shown.committed_epsilon) == (1, 0, 0.0)
    spent = dpsgd_event(noise_multiplier=1.0, sampling_prob=0.01, steps=400)
    done = ledger.commit("one", event=spent, release="bundle")
    assert done.charged_epsilon == pytest.approx(epsilon(spent, delta=1e-5), rel=1e-9)
    shown = ledger.show(IDENTIFIER[:8])
    assert (shown.reserved_runs, shown.committed_runs, shown.releases) == (0, 1, 1)
    assert shown.remaining_epsilon == pytest.approx(3 - done.epsilon)
    assert ledger.releases()[0].release == "bundle"
    assert ledger.runs()[0].config_digest == "c"


def test_runs_compose_and_do_not_add(ledger: Ledger) -> None:
    first, second = gaussian(5.0), dpsgd_event(noise_multiplier=1.0, sampling_prob=0.01, steps=1000)
    alone = reserve(ledger, "one", first).epsilon
    both = reserve(ledger, "two", second)
    assert both.charged_epsilon == pytest.approx(epsilon(composed([first, second]), delta=1e-5), rel=1e-9)
    assert max(alone, both.epsilon) < both.charged_epsilon < alone + both.epsilon


def test_beyond_the_budget_is_refused_with_the_figures(ledger: Ledger) -> None:
    event = gaussian(2.5)
    reserve(ledger, "one", event)
    before = ledger.entries()
    with pytest.raises(BudgetExceededError, match=r"epsilon 3 at delta 1e-05 per example, charged so far 1\.\d+, with"):
        reserve(ledger, "two", gaussian(1.0))
    with pytest.raises(BudgetExceededError):
        reserve(ledger, "none", dp_event.NonPrivateDpEvent())
    assert ledger.entries() == before


def test_a_retry_is_the_same_run(ledger: Ledger) -> None:
    first = reserve(ledger, "one", gaussian())
    again = reserve(ledger, "one", gaussian())
    assert again.existing
    assert not first.existing
    assert (again.epsilon, again.charged_epsilon) == (first.epsilon, first.charged_epsilon)
    assert ledger.require_reservation("one", dataset="shop", event=gaussian()).run_id == "one"
    with pytest.raises(InputError, match="another run"):
        reserve(ledger, "one", gaussian(11.0))
    with pytest.raises(PrivacyError, match="another dataset or mechanism"):
        ledger.require_reservation("one", dataset="shop", event=gaussian(11.0))


def test_nothing_without_a_reservation(ledger: Ledger) -> None:
    with pytest.raises(PrivacyError, match="found none"):
        ledger.require_reservation("one", dataset="shop", event=gaussian())
    with pytest.raises(PrivacyError, match="no reservation"):
        ledger.commit("one", event=gaussian())
    reserve(ledger, "one", gaussian())
    ledger.commit("one", event=gaussian())
    with pytest.raises(PrivacyError, match="was committed"):
        ledger.require_reservation("one", dataset="shop", event=gaussian())


def test_no_budget_no_reservation(ledger: Ledger) -> None:
    ledger.register_dataset(OTHER, name="other")
    with pytest.raises(PrivacyError, match="lazydp budget set --dataset"):
        reserve(ledger, "one", gaussian(), dataset="other")
    with pytest.raises(InputError, match="not in the ledger"):
        reserve(ledger, "one", gaussian(), dataset="unknown")


def test_spending_more_than_was_reserved_is_not_released(ledger: Ledger) -> None:
    reserve(ledger, "one", gaussian(10.0))
    with pytest.raises(PrivacyError, match="nothing may be released"):
        ledger.commit("one", event=gaussian(9.0))
    assert ledger.releases() == ()


def test_commit_again_changes_nothing(ledger: Ledger) -> None:
    reserve(ledger, "one", gaussian())
    first = ledger.commit("one", event=gaussian(), release="bundle")
    entries = ledger.entries()
    again = ledger.commit("one", event=gaussian(), release="bundle")
    assert again.existing
    assert again.charged_epsilon == first.charged_epsilon
    assert ledger.entries() == entries
    with pytest.raises(PrivacyError, match="was committed"):
        ledger.commit("one", event=gaussian(11.0))


def test_snapshots_of_a_run_count_once_at_the_latest(ledger: Ledger) -> None:
    def after(steps: int) -> dp_event.DpEvent:
        return gaussian(60.0, steps=steps)

    held = reserve(ledger, "one", after(1000))
    for step in (200, 400, 600):
        snapshot = ledger.commit("one", event=after(step), step=step, final=False)
        # All that was promised stays charged until the run is over.
        assert snapshot.charged_epsilon == held.charged_epsilon
        assert ledger.show("shop").committed_epsilon == pytest.approx(epsilon(after(step), delta=1e-5), rel=1e-9)
    with pytest.raises(PrivacyError, match="later snapshot"):
        ledger.commit("one", event=after(500), final=False)
    assert ledger.commit("one", event=after(600), step=600, final=False).existing
    last = ledger.commit("one", event=after(800), step=800)
    assert last.charged_epsilon == pytest.approx(epsilon(after(800), delta=1e-5), rel=1e-9)
    assert [release.step for release in ledger.releases()] == [200, 400, 600, 800]


def test_void_gives_back_what_was_never_released(ledger: Ledger) -> None:
    reserve(ledger, "one", gaussian())
    with pytest.raises(InputError, match="name and a reason"):
        ledger.void("one", by="", reason="crashed")
    with pytest.raises(InputError, match="name and a reason"):
        ledger.void("one", by="officer", reason=" ")
    ledger.void("one", by="officer", reason="crashed")
    assert ledger.show("shop").charged_epsilon == 0
    assert (ledger.runs()[0].status, ledger.runs()[0].void_reason) == ("voided", "crashed")
    with pytest.raises(PrivacyError, match="was voided"):
        ledger.void("one", by="officer", reason="again")
    with pytest.raises(PrivacyError, match="was voided"):
        ledger.commit("one", event=gaussian())
    with pytest.raises(PrivacyError, match="was voided"):
        reserve(ledger, "one", gaussian())
    with pytest.raises(PrivacyError, match="no reservation"):
        ledger.void("two", by="officer", reason="crashed")


def test_void_keeps_what_snapshots_released(ledger: Ledger) -> None:
    reserve(ledger, "one", gaussian(10.0, steps=4))
    ledger.commit("one", event=gaussian(10.0, steps=2), step=2, final=False)
    ledger.void("one", by="officer", reason="the machine burnt down")
    shown = ledger.show("shop")
    expected = epsilon(gaussian(10.0, steps=2), delta=1e-5)
    assert shown.charged_epsilon == shown.committed_epsilon == pytest.approx(expected, rel=1e-9)


def test_a_budget_is_raised_with_a_name_and_a_reason_only(ledger: Ledger) -> None:
    for change in ({"epsilon": 4.0, "delta": 1e-5}, {"epsilon": 3.0, "delta": 1e-4}):
        with pytest.raises(InputError, match="name and a reason"):
            ledger.set_budget("shop", **change, by="officer")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="name and a reason"):
            ledger.set_budget("shop", **change, reason="need")  # type: ignore[arg-type]
    raised = ledger.set_budget("shop", epsilon=4.0, delta=1e-5, by="officer", reason="new season")
    assert (raised.epsilon, raised.set_by, raised.reason) == (4.0, "officer", "new season")
    assert ledger.set_budget("shop", epsilon=2.0, delta=1e-5).epsilon == 2.0
    entries = len(ledger.entries())
    ledger.set_budget("shop", epsilon=2.0, delta=1e-5)
    assert len(ledger.entries()) == entries


@pytest.mark.parametrize(
    "wrong",
    [{"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}, {"delta": 1.0}, {"privacy_unit": "item"}],
    ids=str,
)
def test_impossible_budgets_are_refused(ledger: Ledger, wrong: dict) -> None:
    with pytest.raises(InputError):
        ledger.set_budget("shop", **({"epsilon": 1.0, "delta": 1e-5} | wrong))


def test_delta_of_the_answer_is_the_budgets(ledger: Ledger) -> None:
    event = gaussian()
    reserve(ledger, "one", event)
    ledger.set_budget("shop", epsilon=3.0, delta=1e-7)
    assert ledger.show("shop").charged_epsilon == pytest.approx(epsilon(event, delta=1e-7), rel=1e-9)


def test_units_do_not_mix(ledger: Ledger) -> None:
    user = user_level_event(noise_multiplier=20.0, sampling_prob=0.01, steps=10, max_examples_per_user=3)
    with pytest.raises(PrivacyError, match="per example"):
        reserve(ledger, "two", user, privacy_unit="user")
    reserve(ledger, "one", gaussian())
    with pytest.raises(InputError, match="ledger of its own"):
        ledger.set_budget("shop", epsilon=3.0, delta=1e-5, privacy_unit="user")
    ledger.register_dataset(OTHER, name="people")
    ledger.set_budget("people", epsilon=3.0, delta=1e-5, privacy_unit="user")
    assert reserve(ledger, "three", user, dataset="people", privacy_unit="user").epsilon > 0
    with pytest.raises(InputError, match=r"per \w+ and per \w+"):
        ledger.register_dataset(THIRD, name="both", parents=[IDENTIFIER, OTHER])


# --- families ----------------------------------------------------------------------------------------------------


def test_a_run_counts_against_every_dataset_that_shares_users(ledger: Ledger) -> None:
    ledger.register_dataset(OTHER, name="shop, next month", parents=["shop"])
    ledger.register_dataset(THIRD, name="shop, a sample", parents=["shop"])
    ledger.set_budget("shop, next month", epsilon=2.0, delta=1e-5)
    event = gaussian(4.0)
    expected = epsilon(event, delta=1e-5)
    reserve(ledger, "one", event, dataset="shop, next month")
    # The parent pays; and a sibling's run counts here, for both may hold the same users.
    assert ledger.show("shop").charged_epsilon == pytest.approx(expected, rel=1e-9)
    assert ledger.show("shop").family == (OTHER, THIRD)
    ledger.set_budget("shop, a sample", epsilon=5.0, delta=1e-5)
    assert ledger.show("shop, a sample").charged_epsilon == pytest.approx(expected, rel=1e-9)
    # The tightest budget of the family decides.
    with pytest.raises(BudgetExceededError, match="shop, next month, which shares users with shop, a sample"):
        reserve(ledger, "two", gaussian(2.0), dataset="shop, a sample")


def test_a_common_source_makes_a_family(ledger: Ledger) -> None:
    ledger.register_dataset(IDENTIFIER, name="shop", sources=["log-1"])
    ledger.register_dataset(OTHER, name="shop, other features", sources=["log-1", "log-2"])
    ledger.register_dataset(THIRD, name="else", sources=["log-3"])
    assert ledger.show(OTHER).family == (IDENTIFIER,)
    assert ledger.show(THIRD).family == ()


def test_spend_before_the_link_counts_after_it(ledger: Ledger) -> None:
    ledger.register_dataset(OTHER, name="other")
    ledger.set_budget("other", epsilon=3.0, delta=1e-5)
    one, two = gaussian(5.0), gaussian(6.0)
    reserve(ledger, "one", one)
    reserve(ledger, "two", two, dataset="other")
    ledger.register_dataset(OTHER, name="other", parents=["shop"])
    both = epsilon(composed([one, two]), delta=1e-5)
    assert ledger.show("shop").charged_epsilon == pytest.approx(both, rel=1e-9)
    assert ledger.show("other").charged_epsilon == pytest.approx(both, rel=1e-9)
    with pytest.raises(InputError, match="not in the ledger"):
        ledger.register_dataset(OTHER, name="other", parents=["nowhere"])


# --- other mechanisms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", ["vocabulary", "metrics"])
def test_vocabularies_and_metrics_are_charged(ledger: Ledger, purpose: str) -> None:
    done = ledger.charge(
        dataset="shop", event=dp_event.LaplaceDpEvent(2.0), run_id="v1", purpose=purpose, release="items.txt"
    )
    assert done.charged_epsilon == pytest.approx(0.5, rel=1e-3)
    assert [(release.purpose, release.release) for release in ledger.releases()] == [(purpose, "items.txt")]


def test_a_sweep_is_charged_for_its_trials(ledger: Ledger) -> None:
    trial = gaussian(20.0)
    held = reserve(ledger, "sweep", tuning_event(trial, mean_trials=10, shape=1.0), purpose="tuning")
    assert held.epsilon > epsilon(trial, delta=1e-5)
    with pytest.raises(InputError, match="purpose"):
        reserve(ledger, "else", trial, purpose="fun")


def test_a_thousand_releases_answer_in_under_a_second(ledger_url: str) -> None:
    with Ledger.open(ledger_url) as ledger:
        ledger.register_dataset(IDENTIFIER, name="shop")
        ledger.set_budget("shop", epsilon=50.0, delta=1e-5)
        write_releases(ledger, 1000)
        if ledger_url.startswith("sqlite"):
            ledger.remember()  # they were written around it
    with Ledger.open(ledger_url, read_only=True) as ledger:
        started = time.process_time()
        shown = ledger.show("shop")
        assert time.process_time() - started < 1
    assert shown.releases == 1000
    assert 3 < shown.charged_epsilon < 50
    with Ledger.open(ledger_url) as ledger:
        before = ledger.show("shop").charged_epsilon
        # The first answer after a start composes what it has not kept; the next run finds it kept.
        reserve(ledger, "warm", kind_of_run(0))
        # (Time of the processor: how busy the machine is otherwise is of no account.)
        started = time.process_time()
        held = reserve(ledger, "more", kind_of_run(1))
        assert time.process_time() - started < 1
        assert held.charged_epsilon > before


@pytest.mark.slow
def test_a_thousand_distinct_releases(sqlite_url: str) -> None:
    """Each its own mechanism: figures at once, one more in under a second from what lies on the disk, and the truth."""
    library = PLDAccountant()
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset(IDENTIFIER, name="shop")
        ledger.set_budget("shop", epsilon=50.0, delta=1e-5)
        for number in range(1000):
            event = distinct_run(number)
            library.compose(event)
            reserve(ledger, f"run-{number}", event)
            ledger.commit(f"run-{number}", event=event, release="b")
    with Ledger.open(sqlite_url, read_only=True) as ledger:
        started = time.process_time()
        shown = ledger.show("shop")
        assert time.process_time() - started < 1
    assert shown.releases == 1000
    assert shown.committed_epsilon == pytest.approx(library.get_epsilon(1e-5), rel=1e-6)
    # As in the next process: nothing in memory.
    loss_store.default_store.cache_clear()
    with Ledger.open(sqlite_url) as ledger:
        started = time.process_time()
        reserve(ledger, "more", distinct_run(1000))
        assert time.process_time() - started < 1


def distinct_run(number: int) -> dp_event.DpEvent:
    return dpsgd_event(noise_multiplier=2 + number * 0.003, sampling_prob=0.001 + number * 1e-6, steps=100 + number)


def kind_of_run(number: int) -> dp_event.DpEvent:
    """Five kinds of training run, as a shop that retrains every day would have."""
    return dpsgd_event(noise_multiplier=4.0 + number % 5 / 10, sampling_prob=0.01, steps=100)


def write_releases(ledger: Ledger, count: int) -> None:
    """Reserve and commit `count` runs without composing after each: only the last account is computed."""
    with ledger._storage.locked() as transaction:
        entries = transaction.read()
        last = entries[-1]
        state = LedgerState.replayed(entries)
        for number in range(count):
            event = event_to_json(kind_of_run(number))
            claim = {
                "purpose": "training", "privacy_unit": "example", "event": event, "config_digest": "",
                "code_version": "0", "epsilon": 0.1,
            }  # fmt: skip
            release = {"event": event, "release": "b", "step": None, "final": True, "epsilon": 0.1}
            for kind, content in (("reserved", claim), ("committed", release)):
                accounts = {}
                if number == count - 1 and kind == "committed":
                    state.apply(chained(last, kind, f"run-{number}", {**content, "accounts": {}}))  # type: ignore[arg-type]
                    accounts = {IDENTIFIER: asdict(account_of(state, IDENTIFIER))}
                last = chained(last, kind, f"run-{number}", {**content, "accounts": accounts})  # type: ignore[arg-type]
                if not accounts:
                    state.apply(last)
                transaction.append(last)


def chained(last: Entry, kind: Kind, run_id: str, content: dict) -> Entry:
    return next_entry(
        last,
        kind=kind,
        dataset=IDENTIFIER,
        run_id=run_id,
        recorded_at="2026-01-01T00:00:00+00:00",
        recorded_by="tester",
        content=content,
    )


def test_read_only(ledger_url: str) -> None:
    with pytest.raises((UnavailableError, FormatError), match="no ledger"):
        Ledger.open(ledger_url, read_only=True).budgets()
    with Ledger.open(ledger_url) as ledger:
        ledger.register_dataset(IDENTIFIER, name="shop")
        assert ledger.head().startswith("1:")
    with Ledger.open(ledger_url, read_only=True) as ledger:
        assert [budget.name for budget in ledger.budgets()] == ["shop"]
        assert ledger.show("shop").epsilon is None


KEY, SECOND = "1" * 64, "2" * 64


def test_a_reservation_is_one_key(ledger: Ledger) -> None:
    reserve(ledger, "one", gaussian(), key=KEY)
    for attempt in (
        lambda: reserve(ledger, "one", gaussian(), key=SECOND),
        lambda: ledger.require_reservation("one", dataset="shop", event=gaussian(), key=SECOND),
        lambda: ledger.require_reservation("one", dataset="shop", event=gaussian()),
        lambda: ledger.commit("one", event=gaussian(), release="bundle", key=SECOND),
        lambda: ledger.commit("one", event=gaussian(), release="bundle"),
        lambda: ledger.commit("one", event=gaussian(), step=3, final=False, release="snapshot", key=SECOND),
    ):
        with pytest.raises(PrivacyError, match="bound to one noise key"):
            attempt()
    assert reserve(ledger, "one", gaussian(), key=KEY).existing
    assert not ledger.commit("one", event=gaussian(), release="bundle", key=KEY).existing


def test_a_second_release_for_one_charge_needs_the_same_key(ledger: Ledger) -> None:
    reserve(ledger, "keyed", gaussian(), key=KEY)
    first = ledger.commit("keyed", event=gaussian(), release="bundle", key=KEY)
    assert ledger.commit("keyed", event=gaussian(), release="bundle", key=KEY).existing
    again = ledger.commit("keyed", event=gaussian(), release="the same, staged later", key=KEY)
    assert not again.existing
    assert again.charged_epsilon == first.charged_epsilon
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        ledger.commit("keyed", event=gaussian(), release="another model", key=SECOND)
    # Nothing proves anything where no key was ever presented.
    reserve(ledger, "plain", gaussian())
    ledger.commit("plain", event=gaussian(), release="bundle")
    with pytest.raises(PrivacyError, match="second release for one charge"):
        ledger.commit("plain", event=gaussian(), release="another model")
    assert [release.release for release in ledger.releases()] == ["bundle", "the same, staged later", "bundle"]
    assert not verify(ledger.entries()).problems


def test_the_first_key_binds_a_reservation_without_one(ledger: Ledger) -> None:
    reserve(ledger, "one", gaussian())
    assert ledger.runs()[0].key == ""
    reserve(ledger, "one", gaussian(), key=KEY)
    assert ledger.runs()[0].key == KEY
    entries = len(ledger.entries())
    reserve(ledger, "one", gaussian(), key=KEY)
    reserve(ledger, "one", gaussian())  # the gate, repeated
    assert len(ledger.entries()) == entries
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        reserve(ledger, "one", gaussian(), key=SECOND)
    assert not verify(ledger.entries()).problems


def test_a_budget_admits_itself_and_not_a_thousandth_more(ledger: Ledger) -> None:
    """What is composed is held against the budget itself: a slack of 0.1 %, or of a part of that, is none."""
    two = epsilon(composed([gaussian(), gaussian()]), delta=1e-5)
    reserve(ledger, "one", gaussian())
    for slack in (1e-3, 1e-4, 1e-6):
        ledger.set_budget("shop", epsilon=two * (1 - slack), delta=1e-5, by="officer", reason="test")
        with pytest.raises(BudgetExceededError):
            reserve(ledger, "two", gaussian())
    ledger.set_budget("shop", epsilon=two, delta=1e-5, by="officer", reason="test")
    assert reserve(ledger, "two", gaussian()).charged_epsilon == two
