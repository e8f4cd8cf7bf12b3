"""A ledger that is older than the model that is served is told on the page, beside the budget and by /readyz."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.export.export import export
from lazydp.components.train.run.train import train

OLDER = "ledger is older than the model"


def kept(ledger: Path, name: str) -> Path:
    """A copy of the ledger as it is now, as a backup is made."""
    copy = ledger.with_name(name)
    with sqlite3.connect(ledger) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    target.close()
    source.close()
    return copy


@pytest.fixture
def ledgers(tiny: Any) -> dict[str, Path]:
    """A release stands in `bundle`; the ledger before the run, before the release, and now, and another one."""
    url = tiny.ledger()
    found = {"now": tiny.folder / "ledger.db"}
    found["before the run"] = kept(found["now"], "empty.db")
    run = train(dataset=tiny.dataset, config=tiny.config(steps=1), out=tiny.folder / "run", ledger=url).folder
    found["before the release"] = kept(found["now"], "reserved.db")
    manifest = export(run=run, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    found["another"] = tiny.folder / "another.db"
    with Ledger.open(f"sqlite:///{found['another']}") as ledger:
        ledger.register_dataset(manifest.lineage.dataset, name="tiny")
        for epsilon in (900.0, 800.0, 700.0, 600.0):
            ledger.set_budget("tiny", epsilon=epsilon, delta=1e-5)
    return found


def test_a_ledger_older_than_the_model_is_told(start: Any, tiny: Any, ledgers: dict[str, Path]) -> None:
    for name, said in {
        "now": None,
        "before the run": OLDER,
        "before the release": OLDER,
        "another": "not the one that the model was released under",
    }.items():
        with start(tiny.folder / "bundle", ledger=f"sqlite:///{ledgers[name]}") as client:
            budget = client.get("/v1/privacy/budget").json()
            page = client.get("/").text
            ready = client.get("/readyz")
            assert ready.status_code == 200
            if said is None:
                assert budget["notice"] is None
                assert budget["models"][0]["notice"] is None
                assert ready.json()["ledger"] == {}
                assert OLDER not in page
            else:
                assert said in budget["notice"], name
                assert said in budget["models"][0]["notice"]
                assert said in ready.json()["ledger"]["tiny"]
                assert said in page
