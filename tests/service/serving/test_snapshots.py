"""The service answers from each new snapshot of a run while the run trains on."""

import threading
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.export.publish import Snapshots
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.sample.sample import SampleSize, make_sample
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.run.train import train
from support.service_load import eventually

CONFIG = {
    "model": {"kind": "two_tower", "embedding_dim": 8},
    "privacy_unit": "example",
    "sampling_prob": 0.05,
    "expected_batch_size": 30,
    "steps": 30,
    "noise_multiplier": 2.0,
    "target_delta": 1e-5,
    "publish_every": 10,
}


def test_the_service_follows_a_run(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sample(tmp_path / "sample", size=SampleSize(users=60, items=40, interactions=600))
    ingest(
        [str(tmp_path / "sample" / "interactions.parquet")], str(tmp_path / "sample" / "spec.yaml"), tmp_path / "data"
    )
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        register(ledger, fingerprint=EncodedDataset.open(tmp_path / "data").manifest.fingerprint, name="sample")
        ledger.set_budget("sample", epsilon=100.0, delta=1e-5)
    snapshots = tmp_path / "snapshots"
    first, second = snapshots / "step-000000010", snapshots / "step-000000020"
    # Training waits where the test looks: before step 16, and before step 26.
    watched = {15: threading.Event(), 25: threading.Event()}
    step = Engine.step

    def waiting(self: Engine, examples: Any) -> Any:
        if self.steps_done in watched:
            assert watched[self.steps_done].wait(60)
        return step(self, examples)

    monkeypatch.setattr(Engine, "step", waiting)
    run = threading.Thread(
        target=train,
        kwargs={
            "dataset": tmp_path / "data",
            "config": TrainConfig.parse(CONFIG, where="test"),
            "out": tmp_path / "run",
            "ledger": url,
            "publish": Snapshots(snapshots, url).release,
        },
    )
    run.start()
    try:
        eventually((snapshots / "current").exists)
        with start(snapshots / "current", poll_s=0.05, allow_test_key=False, ledger=url) as client:

            def served() -> Any:
                return client.get("/v1/models").json()["models"][0]["version"]

            def spent() -> Any:
                return client.get("/v1/privacy/budget").json()["models"][0]["statement"]["epsilon"]

            assert served() == BundleManifest.load(first).version
            earlier = spent()
            assert client.post("/v1/recommendations", json={"user_id": "u1", "k": 5}).status_code == 200
            watched[15].set()
            eventually(lambda: second.is_dir() and served() == BundleManifest.load(second).version)
            assert run.is_alive()  # it is still training
            assert spent() > earlier
            assert client.post("/v1/recommendations", json={"user_id": "u1", "k": 5}).status_code == 200
            watched[25].set()
            run.join(60)
    finally:
        for event in watched.values():
            event.set()
        run.join(60)
