"""The exporter refuses a run with a planted fault, says which it is, and spends nothing. (F1 and F5: the games.)"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.budget.ledger import ledger as ledger_module
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.export.export import export
from lazydp.components.shared.errors import LazyDPError, PendingNoiseError, PrivacyError
from lazydp.components.train.run.train import train
from lazydp.components.train.tables.embedding_tables import EmbeddingTables
from lazydp.components.train.tables.precision import Rounding


def marked_only(patch: pytest.MonkeyPatch) -> None:
    """A flush that says it was there."""

    def mark(self: EmbeddingTables) -> None:
        for table in self.state_dict()["tables"].values():
            table["last"].fill_(self.step)

    patch.setattr(EmbeddingTables, "flush", mark)


def missing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EmbeddingTables, "flush", lambda self: None)


def one_float(patch: pytest.MonkeyPatch) -> None:
    """F3: rows of one float32, however small the noise."""
    patch.setattr(Rounding, "begins_with_two", lambda *_: False)
    patch.setattr(Rounding, "needs_second_float", lambda *_, **__: False)


def statuses(url: str) -> list[str]:
    with Ledger.open(url, read_only=True) as ledger:
        return [run.status for run in ledger.runs()]


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], type[LazyDPError], str]] = {
    "a missing flush": (missing, {}, PendingNoiseError, r"its noise is applied up to step \d of 2"),
    "a flush that only marks rows": (marked_only, {}, PendingNoiseError, "has none of its noise .the flush is missing"),
    "F3, noise below rounding": (
        one_float,
        {"embeddings": {"learning_rate": 1e-9}},
        PrivacyError,
        "noise is lost to rounding",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_exporter_names_the_fault(name: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, settings, error, said = FAULTS[name]
    url = tiny.ledger()
    config = tiny.config(steps=2, **settings)
    run = train(dataset=tiny.dataset, config=config, out=tiny.folder / "run", ledger=url).folder
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(error, match=said):
            export(run=run, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    assert not (tiny.folder / "bundle").exists()
    assert statuses(url) == ["reserved"]
    # The control: without the fault the same run is released.
    export(run=run, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    assert statuses(url) == ["committed"]


def test_a_second_model_for_one_charge_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """F2: the check of keys before training is gone, and a copy of the run was trained under noise of its own."""
    url = tiny.ledger()

    def trained(out: Path) -> Path:
        config = tiny.config(steps=2)
        folder: Path = train(dataset=tiny.dataset, config=config, out=out, ledger=url, resume=True).folder
        return folder

    first = trained(tiny.folder / "run")
    second = first.with_name("copy")
    shutil.copytree(first, second)
    shutil.rmtree(second / "checkpoints")
    (second / "root.key").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "check_key", lambda run, key: None)
        trained(second)
    export(run=first, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    with pytest.raises(PrivacyError, match="is bound to one noise key"):
        export(run=second, dataset=tiny.dataset, out=tiny.folder / "second", ledger=url)
    assert not (tiny.folder / "second").exists()
