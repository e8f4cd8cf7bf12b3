"""From the feature spec to the bundle: which family was declared, and that it is a declaration."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle
from lazydp.components.export.export import export
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import BudgetExceededError, PrivacyError
from lazydp.components.train.run.train import train


def ingested(tiny: Any, name: str, *, rows: int, declares: str = "") -> Path:
    """The interactions of the tiny dataset, or the first of them, under its spec."""
    source = tiny.dataset.parent
    table = pq.read_table(source / "interactions.parquet")
    pq.write_table(table.slice(0, rows), tiny.folder / f"{name}.parquet")
    spec = tiny.folder / f"{name}.yaml"
    spec.write_text(declares + (source / "spec.yaml").read_text())
    ingest([str(tiny.folder / f"{name}.parquet")], str(spec), tiny.folder / name)
    return tiny.folder / name


def test_a_reingest_with_a_row_changed_draws_on_the_same_budget(tiny: Any) -> None:
    url = f"sqlite:///{tiny.folder / 'ledger.db'}"
    monday, tuesday = (ingested(tiny, name, rows=rows) for name, rows in (("monday", 899), ("tuesday", 900)))
    assert EncodedDataset.open(monday).manifest.family == "tiny"
    prints = {EncodedDataset.open(path).manifest.fingerprint for path in (monday, tuesday)}
    assert len(prints) == 2
    tiny.ledger(epsilon=1.0)  # knows the dataset of all 900 rows, with no family yet
    config = tiny.config(steps=2, noise_multiplier=8.0)
    with pytest.raises(PrivacyError, match="has no budget"):
        train(dataset=monday, config=config, out=tiny.folder / "early", ledger=url)
    train(dataset=tuesday, config=config, out=tiny.folder / "run", ledger=url)
    with Ledger.open(url) as ledger:
        spent = ledger.show("tiny").charged_epsilon
        ledger.set_budget("tiny", epsilon=1.05 * spent, delta=1e-5)
    with pytest.raises(BudgetExceededError):
        train(dataset=monday, config=config, out=tiny.folder / "second", ledger=url)
    export(run=tiny.folder / "run", dataset=tuesday, out=tiny.folder / "bundle", ledger=url)
    family = Bundle.open(tiny.folder / "bundle").statement.family
    assert family is not None
    assert family.name == "tiny"
    assert "declaration" in family.declaration


def test_the_spec_declares_a_family(tiny: Any) -> None:
    plain, declared = (
        ingested(tiny, name, rows=300, declares=text) for name, text in (("a", ""), ("b", "family: us\n"))
    )
    first, second = (EncodedDataset.open(path).manifest for path in (plain, declared))
    assert (first.family, second.family) == ("tiny", "us")
    assert first.fingerprint == second.fingerprint  # a declaration about the rows, none of them
