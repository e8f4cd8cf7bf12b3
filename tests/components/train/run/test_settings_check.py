"""What can be known before a run is checked before it spends anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.evaluate.evaluate import evaluate
from lazydp.components.evaluate.user_scores import check_scorable
from lazydp.components.gate.component import budget_gate
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import InputError
from lazydp.components.train.run.settings_check import check_fits, warn_of_settings

CLICKS = "name: a\nlabel: {kind: column, column: y}\nsplit: {kind: none}\n"
CLICKS += "features: [{name: x, kind: dense, bounds: [0, 1]}]\n"
NO_TRAIN = "name: a\nlabel: {kind: column, column: y}\nsplit: {kind: column, column: s}\n"
NO_TRAIN += "features: [{name: x, kind: dense, bounds: [0, 1]}]\n"
TWO_TOWER = "model: {kind: two_tower}\nsampling_prob: 0.5\nexpected_batch_size: 4\nsteps: 2\nnoise_multiplier: 1\n"
TWO_TOWER += "target_delta: 1.0e-5\nprivacy_unit: example\n"
DLRM = TWO_TOWER.replace("two_tower", "dlrm")


def dataset(folder: Path, spec: str) -> Path:
    pq.write_table(pa.table({"y": [0, 1] * 4, "x": [0.5] * 8, "s": ["test"] * 8}), folder / "log.parquet")
    ingest([str(folder / "log.parquet")], spec, folder / "data")
    return folder / "data"


BAD: dict[str, tuple[str, str, str]] = {
    "a model that needs items": (CLICKS, TWO_TOWER, "item"),
    "counts of items": (
        CLICKS,
        DLRM + "popularity: {noise_multiplier: 9}\n",
        "popularity counts items",
    ),
    "users that are not there": (CLICKS, DLRM.replace(": example", ": user"), "privacy_unit user needs a bound"),
    "nothing to train on": (NO_TRAIN, DLRM, "has no training examples"),
}


@pytest.mark.parametrize(("spec", "config", "message"), BAD.values(), ids=BAD.keys())
def test_the_gate_refuses_what_would_fail_and_reserves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, config: str, message: str
) -> None:
    monkeypatch.setenv("LAZYDP_OPERATOR", "")
    folder = SimpleNamespace(path=str(dataset(tmp_path, spec)))
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger.open(url):
        pass
    page = SimpleNamespace(path=str(tmp_path / "page"))
    common = {"dataset": folder, "config": config, "job_id": "one", "page": page}
    with pytest.raises(InputError, match=message):
        budget_gate.python_func(**common, ledger_url=url, budget_epsilon=9.0)
    with Ledger.open(url, read_only=True) as ledger:
        assert list(ledger.runs()) == []


def test_without_held_out_examples_nothing_is_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_untrained(tmp_path / "bundle", kind="two_tower", num_items=80, dim=8)
    spec = Bundle.open(tmp_path / "bundle", allow_test_key=True).spec
    without = SimpleNamespace(spec=spec, split=lambda _: [])
    monkeypatch.setattr(EncodedDataset, "open", lambda *_: without)
    found = evaluate(bundle=tmp_path / "bundle", dataset=tmp_path / "data")
    assert (found.examples, found.model, found.figures()) == (0, None, {})
    assert found.table() == "no metrics: the dataset has no held-out examples"
    assert "nothing is measured" in caplog.text


def test_a_sweep_that_could_not_score_is_refused_first(tmp_path: Path) -> None:
    data = EncodedDataset.open(dataset(tmp_path, CLICKS))
    with pytest.raises(InputError, match="no test examples to score trials on"):
        check_scorable(data, "brier")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling_prob": 0.05, "expected_batch_size": 40}, None),
        ({"sampling_prob": 0.001, "expected_batch_size": 40}, "weaker"),
        ({"sampling_prob": 0.5, "expected_batch_size": 40}, "stronger"),
    ],
)
def test_a_divisor_far_from_the_batch_is_told(
    tiny: Any, caplog: pytest.LogCaptureFixture, changes: dict[str, float], says: str | None
) -> None:
    data = EncodedDataset.open(tiny.dataset)
    check_fits(data, tiny.config(**changes))
    warn_of_settings(data, tiny.config(**changes))
    assert (says in caplog.text and "[private]" in caplog.text) if says else caplog.text == ""


@pytest.mark.parametrize(("bound", "told"), [(2, True), (8, False)])
def test_a_bound_that_drops_many_rows_is_told(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, bound: int, told: bool
) -> None:
    spec = "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\nsplit: {kind: none}\n"
    spec += f"item: {{column: i, vocabulary: {{kind: integer, size: 3}}}}\nmax_examples_per_user: {bound}\n"
    pq.write_table(pa.table({"u": [1] * 8 + [2, 3], "i": [0, 1] * 5}), tmp_path / "log.parquet")
    ingest([str(tmp_path / "log.parquet")], spec, tmp_path / "data")
    caplog.clear()
    warn_of_settings(EncodedDataset.open(tmp_path / "data"), tiny.config(sampling_prob=0.5, expected_batch_size=4))
    assert ("max_examples_per_user 2 drops 60 %" in caplog.text) is told
