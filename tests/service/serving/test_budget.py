"""The budget that the service shows is the ledger's, and without one it says so."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.report.overview import LedgerOverview
from lazydp.components.bundle.untrained import DATASET
from lazydp.service.serving import budget as budget_module

EMPTY = LedgerOverview.of((), verify(()))


def ledger_with_a_release(url: str) -> None:
    event = dpsgd_event(noise_multiplier=2.0, sampling_prob=0.01, steps=10)
    with Ledger.open(url) as ledger:
        ledger.register_dataset(DATASET, name="films")
        ledger.set_budget("films", epsilon=3.0, delta=1e-5)
        ledger.reserve(dataset="films", event=event, run_id="one")
        ledger.commit("one", event=event, release="abc")
        ledger.reserve(dataset="films", event=event, run_id="two")


def test_figures_of_the_ledger(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger_with_a_release(url)
    with Ledger.open(url, read_only=True) as ledger:
        expected = ledger.show("films")
    before = (tmp_path / "ledger.db").read_bytes()
    with start(bundles["towers"], ledger=url) as client:
        budget = client.get("/v1/privacy/budget").json()
        assert budget["source"] == "ledger"
        assert budget["notice"] is None
        dataset = budget["datasets"][0]
        assert dataset["name"] == "films"
        assert dataset["epsilon_budget"] == 3.0
        assert dataset["epsilon_spent"] == expected.committed_epsilon
        assert 0 < dataset["epsilon_reserved"] == expected.charged_epsilon - expected.committed_epsilon
        assert dataset["epsilon_remaining"] == expected.remaining_epsilon
        releases = client.get("/v1/privacy/releases").json()
        assert [entry["kind"] for entry in releases["entries"]] == [
            "dataset",
            "budget",
            "reserved",
            "committed",
            "reserved",
        ]
        page = client.get("/").text
        assert "Of epsilon 3, " in page
        assert "reserved by open runs" in page
    assert (tmp_path / "ledger.db").read_bytes() == before


def test_without_a_ledger_the_statements_speak(client: httpx.Client) -> None:
    budget = client.get("/v1/privacy/budget").json()
    assert budget["source"] == "statement"
    assert "no ledger is configured" in budget["notice"]
    assert {model["name"] for model in budget["models"]} == {"untrained", "popular", "dlrm"}
    assert budget["models"][0]["statement"]["why_not_private"]


def test_a_ledger_that_does_not_answer_fails_nothing(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    with start(bundles["towers"], ledger=f"sqlite:///{tmp_path / 'nothing.db'}") as client:
        budget = client.get("/v1/privacy/budget")
        assert budget.status_code == 200
        assert budget.json()["source"] == "statement"
        assert "does not answer" in budget.json()["notice"]
        assert str(tmp_path) not in budget.text
        assert client.get("/").status_code == 200
    assert not (tmp_path / "nothing.db").exists()


def test_metrics_read_the_ledger_themselves(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger_with_a_release(url)
    with Ledger.open(url, read_only=True) as ledger:
        spent = ledger.show("films").committed_epsilon
    with start(bundles["towers"], ledger=url) as client:
        text = client.get("/metrics").text
    assert f'lazydp_dataset_epsilon_spent{{dataset="{DATASET}"}} {spent}' in text
    assert "lazydp_ledger_up 1.0" in text
    with start(bundles["towers"], ledger=f"sqlite:///{tmp_path / 'nothing.db'}") as client:
        assert "lazydp_ledger_up 0.0" in client.get("/metrics").text


def test_a_ledger_that_hangs_holds_up_nobody_for_long(
    start: Any, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    come_back, readings = threading.Event(), []

    def hanging(url: str) -> LedgerOverview:
        readings.append(url)
        come_back.wait(30)
        return EMPTY

    monkeypatch.setattr(budget_module, "_read_ledger", hanging)
    monkeypatch.setattr(budget_module, "_PATIENCE_SECONDS", 0.2)
    with start(bundles["towers"], ledger="postgresql://nobody@192.0.2.1/ledger") as client:
        with ThreadPoolExecutor(8) as people:
            answers = list(people.map(lambda _: client.get("/v1/privacy/budget").json(), range(8)))
        assert {answer["source"] for answer in answers} == {"statement"}
        assert all("does not answer" in answer["notice"] for answer in answers)
        # All of them waited for one reading, and no thread was added for those who came after.
        assert len(readings) == 1
        come_back.set()
        deadline = time.monotonic() + 30
        while client.get("/v1/privacy/budget").json()["source"] != "ledger":
            assert time.monotonic() < deadline


def test_a_reading_that_never_ends_does_not_blind_the_service(
    start: Any, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    come_back = threading.Event()
    readings: list[str] = []

    def hanging_once(url: str) -> LedgerOverview:
        readings.append(url)
        if len(readings) == 1:
            come_back.wait(60)
        return EMPTY

    monkeypatch.setattr(budget_module, "_read_ledger", hanging_once)
    monkeypatch.setattr(budget_module, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(budget_module, "_GIVEN_UP_SECONDS", 0.5)
    with start(bundles["towers"], ledger="postgresql://nobody@192.0.2.1/ledger") as client:
        deadline = time.monotonic() + 30
        while client.get("/v1/privacy/budget").json()["source"] != "ledger":
            assert time.monotonic() < deadline
        come_back.set()


def test_a_ledger_that_cannot_be_read_fails_nothing(
    start: Any, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(url: str) -> Any:
        raise RecursionError(url)

    monkeypatch.setattr(budget_module, "_read_ledger", unreadable)
    with start(bundles["towers"], ledger="postgresql://nobody@192.0.2.1/ledger") as client:
        for path in ("/v1/privacy/budget", "/v1/privacy/releases", "/metrics", "/"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/privacy/budget").json()["source"] == "statement"
