"""Clocks that go backwards or jump: order and freshness never rest on them."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.shared.errors import BudgetExceededError
from support.service import running
from support.service_load import eventually

EVENT = dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=1)
# In years: back, on by a century, back to before there were computers.
JUMPS = (0, -1, 100, -80)


def test_the_ledger_decides_alike_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        years = 0

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime(2026 + cls.years, 1, 1, tzinfo=tz)

    monkeypatch.setattr(datetime, "datetime", Clock)
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        ledger.set_budget("shop", epsilon=0.6, delta=1e-5)
        for years in JUMPS[:2]:
            Clock.years = years
            ledger.reserve(dataset="shop", event=EVENT, run_id=f"run{years}")
    for years in JUMPS[2:]:
        Clock.years = years
        with Ledger.open(url) as ledger, pytest.raises(BudgetExceededError):
            ledger.reserve(dataset="shop", event=EVENT, run_id=f"run{years}")
    with Ledger.open(url) as ledger:
        ledger.void("run0", by="officer", reason="test")
        ledger.reserve(dataset="shop", event=EVENT, run_id="later")
        entries = ledger.entries()
        assert [run.run_id for run in ledger.runs() if run.status == "reserved"] == ["run-1", "later"]
    assert verify(entries).problems == ()
    times = [entry.recorded_at for entry in entries]
    assert times != sorted(times)


def test_a_version_of_the_past_is_brought_in(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A machine whose clock is behind wrote it: what counts is that it differs, not that it is later."""
    folder = tmp_path / "current"
    shutil.copytree(bundles["towers"], folder)
    with running(folder, poll_s=0.02) as client:
        first = client.get("/v1/models").json()["models"][0]["version"]
        shutil.copytree(bundles["newer"], folder, dirs_exist_ok=True)
        os.utime(folder / "manifest.json", (1, 1))
        eventually(lambda: client.get("/v1/models").json()["models"][0]["version"] != first)


def test_a_service_goes_on_when_the_clock_jumps(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        ledger.set_budget("shop", epsilon=1.0, delta=1e-5)
    now = time.time
    with running(bundles["towers"], ledger=url) as client:
        for years in JUMPS:
            monkeypatch.setattr(time, "time", lambda years=years: now() + years * 365.25 * 86400)
            budget = client.get("/v1/privacy/budget").json()
            assert (budget["source"], budget["datasets"][0]["name"]) == ("ledger", "shop")
            assert client.get("/v1/users/7/recommendations").status_code == 200
            assert client.get("/readyz").status_code == 200
