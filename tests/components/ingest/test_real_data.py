"""Ingest on public datasets, where they lie beside the repository (never in it)."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT.parent / "shared" / "data"
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"the public datasets are not at {DATA}")


def test_ml_100k(tmp_path: Path) -> None:
    source = DATA / "ml-100k"
    options = IngestOptions(users=str(source / "raw/ml-100k.user"), items=str(source / "raw/ml-100k.item"))
    spec = str(EXAMPLES / "ml-100k" / "spec.yaml")
    manifest = ingest([str(source / "interactions.parquet")], spec, tmp_path / "out", options)
    assert (manifest.counts.users, manifest.counts.items, manifest.counts.test) == (943, 1682, 943)
    assert manifest.counts.max_examples_of_a_user == 64
    assert set(manifest.rejected) == {"over_max_examples_per_user"}
    dataset = EncodedDataset.open(tmp_path / "out")
    assert dataset.item_table is not None
    assert dataset.item_table.slice(0, 1).to_pylist()[0]["title"] == "Toy Story"
    batch = dataset.split("train").take(np.arange(1000))
    for name in ("age", "gender", "occupation"):
        assert (batch.bags[name].values > 0).all(), f"{name}: every value of the data is declared"
    assert (dataset.items.bags["genres"].values > 0).all()
    assert dataset.items.dense[1].item() == pytest.approx(2 * 75 / 80 - 1)


def test_gowalla(tmp_path: Path) -> None:
    source = DATA / "gowalla" / "interactions.parquet"
    options = IngestOptions(memory_bytes=16 << 20)
    manifest = ingest([str(source)], str(EXAMPLES / "gowalla" / "spec.yaml"), tmp_path / "out", options)
    assert (manifest.counts.users, manifest.counts.items, manifest.counts.test) == (29_858, 40_981, 217_242)
    beyond = manifest.rejected["over_max_examples_per_user"]
    assert manifest.counts.train + manifest.counts.test + beyond == manifest.source.rows == 1_027_370
    dataset = EncodedDataset.open(tmp_path / "out")
    seen, test = dataset.seen_items(), dataset.split("test")
    assert seen.values.numel() == manifest.source.rows - manifest.counts.test
    batch = test.take(np.arange(0, len(test), 5000))
    # Without time all of a user's training items precede what is held out.
    assert batch.user_index is not None
    assert batch.bags["history"].lengths().tolist() == seen.lengths()[batch.user_index].clamp(max=500).tolist()


def test_criteo(tmp_path: Path) -> None:
    convert = runpy.run_path(str(EXAMPLES / "criteo-samples" / "convert.py"))["convert"]
    assert convert(DATA / "criteo-samples", tmp_path / "criteo.parquet") == 8000
    spec = str(EXAMPLES / "criteo-samples" / "spec.yaml")
    manifest = ingest([str(tmp_path / "criteo.parquet")], spec, tmp_path / "out")
    assert (manifest.counts.train, manifest.counts.test) == (7609, 391)
    assert manifest.max_examples_per_user is None
    split = EncodedDataset.open(tmp_path / "out").split("train")
    batch = split.take(np.arange(len(split)))
    assert batch.dense.shape == (7609, 13)
    assert len(batch.bags) == 26
    assert 0.1 < float(batch.labels.mean()) < 0.4
    assert float(batch.dense.abs().max()) <= 1
