"""A card tells what a model cost a person, not only an interaction, and of no dataset but the model's own."""

from pathlib import Path
from typing import Any

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle

HOSTILE = "<b>name</b>"


def test_a_ledger_of_other_datasets_is_shown_with_no_model(
    start: Any, bundles: dict[str, Path], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    event = dpsgd_event(noise_multiplier=2.0, sampling_prob=0.01, steps=10)
    with Ledger.open(url) as ledger:
        ledger.register_dataset("e" * 64, name="another one")
        ledger.set_budget("another one", epsilon=9.0, delta=1e-5)
        ledger.reserve(dataset="another one", event=event, run_id="one")
        ledger.commit("one", event=event, release="abc")
    with start(bundles["towers"], bundles["dlrm"], ledger=url) as client:
        budget = client.get("/v1/privacy/budget").json()
        assert budget["source"] == "ledger"
        assert budget["notice"] == "the ledger does not know the dataset of: untrained, dlrm"
        assert [model["budget"] for model in budget["models"]] == [None, None]
        assert all("does not know this model's dataset" in model["notice"] for model in budget["models"])
        page = client.get("/").text
        assert "another one" not in page
        assert page.count("The ledger does not know this model") == 2
        assert "another one" in client.get("/report").text, "the report is of the whole ledger"


def test_a_dataset_of_a_family_shows_the_family_s_budget(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    dataset = Bundle.open(bundles["towers"], allow_test_key=True).manifest.lineage.dataset
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset("e" * 64, name="monday", family=HOSTILE)
        ledger.set_budget("monday", epsilon=3.0, delta=1e-5, reason=HOSTILE, by=HOSTILE)
        ledger.register_dataset(dataset, name="tuesday", family=HOSTILE)
    with start(bundles["towers"], ledger=url) as client:
        document = client.get("/v1/privacy/budget").json()
        (model,) = document["models"]
        assert model["budget"]["name"] == "tuesday"
        assert model["budget"]["epsilon_budget"] == 3.0
        assert model["notice"] is None
        assert document["notice"] is None
        page = client.get("/").text
        assert "Of epsilon 3, 0 is spent by releases" in page
        assert HOSTILE not in page
        assert page.count("&lt;b&gt;name&lt;/b&gt;") == 5


def test_a_ledger_that_does_not_verify_says_so_everywhere(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    import sqlite3

    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset("e" * 64, name="shop", by="A. Turing")
        ledger.set_budget("shop", epsilon=9.0, delta=1e-5, by="A. Turing")
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        triggers = database.execute("select name from sqlite_master where type = 'trigger'").fetchall()
        for (name,) in triggers:
            database.execute(f"drop trigger {name}")
        assert database.execute("update lazydp_entries set recorded_by = 'somebody' where number = 2").rowcount == 1
    database.close()
    with start(bundles["towers"], ledger=url) as client:
        assert "the ledger does not verify: entry 2" in client.get("/v1/privacy/budget").json()["notice"]
        for path in ("/", "/report"):
            page = client.get(path).text
            assert "This ledger does not verify." in page
            assert "entry 2: its content does not match its digest" in page
            assert "The chain is verified" not in page
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute("update lazydp_entries set body = 'nothing' where number = 2")
    database.close()
    with start(bundles["towers"], ledger=url) as client:
        assert "the ledger is damaged" in client.get("/v1/privacy/budget").json()["notice"]
        assert "The ledger is damaged" in client.get("/").text
        assert client.get("/report").status_code == 200
