"""Writes the files of this folder; run with the code of commit 20902bc (see README.md).

python make.py LEDGER_V1 OUT
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from starlette.testclient import TestClient

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.export.export import export
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.engine import Engine
from lazydp.components.train.train import train
from lazydp.service.app import create_app
from lazydp.service.settings import load_settings

SPEC = """
format_version: 1
name: shop
user: {column: user, vocabulary: {kind: hashed, buckets: 64, salt: shop}}
item: {column: item, vocabulary: {kind: declared, table: items}, title: title, metadata: [shelf]}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 12
history: {max_length: 5, pooling: mean}
users: {path: users.parquet, key: user}
items: {path: items.parquet, key: item}
features:
  - {name: age, source: user, kind: dense, bounds: [18, 90]}
  - {name: device, source: context, kind: single, vocabulary: {kind: declared, values: [phone, desktop]}}
  - {name: tags, source: item, kind: list, separator: " ", vocabulary: {kind: hashed, buckets: 32, salt: tags}}
  - {name: price, source: item, kind: dense, bounds: [1, 100], transform: log1p}
"""
CONFIG = {
    "model": {"kind": "two_tower", "embedding_dim": 8},
    "privacy_unit": "example",
    "sampling_prob": 0.05,
    "expected_batch_size": 24,
    "steps": 30,
    "noise_multiplier": 4.0,
    "target_delta": 1e-5,
    "max_grad_norm": 0.5,
    "negatives": 4,
    "embeddings": {"learning_rate": 1.0},
    "popularity": {"noise_multiplier": 20},
    "checkpoint_every": 10,
}
DLRM = {**CONFIG, "model": {"kind": "dlrm", "embedding_dim": 8}, "popularity": None}
STOPPED_AT = 15


def write_tables(folder: Path) -> None:
    """40 users, 24 items, 480 interactions."""
    generator = np.random.default_rng(11)
    users = np.repeat(np.arange(40), 12)
    items = np.concatenate([(user % 2) * 12 + generator.permutation(12) for user in range(40)])
    interactions = {
        "user": [f"u{user}" for user in users],
        "item": [f"i{item}" for item in items],
        "at": np.arange(480),
        "device": np.where(generator.random(480) < 0.5, "phone", "desktop"),
    }
    pq.write_table(pa.table(interactions), folder / "interactions.parquet")
    people = {"user": [f"u{user}" for user in range(40)], "age": generator.integers(18, 90, 40)}
    pq.write_table(pa.table(people), folder / "users.parquet")
    catalogue = {
        "item": [f"i{item}" for item in range(24)],
        "title": [f"Title {item}" for item in range(24)],
        "shelf": [f"shelf {item % 3}" for item in range(24)],
        "tags": [f"tag{item % 5} tag{item % 7}" for item in range(24)],
        "price": generator.uniform(1, 100, 24),
    }
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    (folder / "spec.yaml").write_text(SPEC)


class StoppedError(Exception):
    """Stands for a kill."""


def stopped_run(dataset: Path, config: TrainConfig, out: Path, ledger: str) -> None:
    """A run that was stopped between two checkpoints."""
    whole = Engine.step

    def step(engine: Engine, *arguments: object, **options: object) -> object:
        if engine.steps_done == STOPPED_AT:
            raise StoppedError
        return whole(engine, *arguments, **options)

    Engine.step = step
    try:
        train(dataset=dataset, config=config, out=out, ledger=ledger, run_id="run-stopped")
    except StoppedError:
        pass
    finally:
        Engine.step = whole


def mixed_ledger(ledger_v1: Path, out: Path) -> None:
    """Entries of version 1, then of version 2: the same people, under a keyed identifier."""
    shutil.copy(ledger_v1, out)
    with Ledger.open(f"sqlite:///{out}") as ledger:
        register(ledger, fingerprint="8" * 64, name="orders-again", sources=["7" * 64], by="ada")
        ledger.set_budget("orders-again", epsilon=6.0, delta=1e-5, privacy_unit="example", by="ada")
        event = dpsgd_event(noise_multiplier=4.0, sampling_prob=0.05, steps=30)
        ledger.reserve(dataset="orders-again", event=event, run_id="run-again", by="grace")


def expected(out: Path) -> dict[str, object]:
    """What the code of that commit made of these files."""
    found: dict[str, object] = {"fingerprint": EncodedDataset.open(out / "dataset").manifest.fingerprint}
    for file in ("ledger.db", "ledger-v1.db", "ledger-mixed.db"):
        with Ledger.open(f"sqlite:///{out / file}", read_only=True) as ledger:
            checked = verify(ledger.entries())
            assert not checked.problems
            spent = {budget.name: [budget.charged_epsilon, budget.committed_epsilon] for budget in ledger.budgets()}
            found[file] = {"head": checked.head, "spent": spent}
    for kind in ("two_tower", "dlrm"):
        settings = load_settings(bundles=(out / f"bundle-{kind}",), ledger=f"sqlite:///{out / 'ledger.db'}")
        with TestClient(create_app(settings)) as client:
            answer = client.get("/v1/users/u3/recommendations", params={"k": 5}).json()
        found[f"bundle-{kind}"] = [[item["id"], item["title"], item["score"]] for item in answer["items"]]
    return found


def main(ledger_v1: Path, out: Path) -> None:
    source = out / "source"
    source.mkdir(parents=True)
    write_tables(source)
    dataset = out / "dataset"
    ingest([str(source / "interactions.parquet")], str(source / "spec.yaml"), dataset)
    url = f"sqlite:///{out / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        manifest = EncodedDataset.open(dataset).manifest
        register(ledger, fingerprint=manifest.fingerprint, name="shop", sources=[manifest.source.digest])
        ledger.set_budget("shop", epsilon=50.0, delta=1e-5, privacy_unit="example")
    for kind, document in (("two_tower", CONFIG), ("dlrm", DLRM)):
        config = TrainConfig.parse(document, where="make.py")
        train(dataset=dataset, config=config, out=out / f"run-{kind}", ledger=url, run_id=f"run-{kind}")
        export(run=out / f"run-{kind}", dataset=dataset, out=out / f"bundle-{kind}", ledger=url, name=kind)
        shutil.rmtree(out / f"run-{kind}")
    stopped_run(dataset, TrainConfig.parse(CONFIG, where="make.py"), out / "run-stopped", url)
    train(
        dataset=dataset,
        config=TrainConfig.parse(CONFIG, where="make.py"),
        out=out / "run-finished",
        ledger=url,
        run_id="run-finished",
    )
    shutil.copy(ledger_v1, out / "ledger-v1.db")
    mixed_ledger(ledger_v1, out / "ledger-mixed.db")
    (out / "expected.json").write_text(json.dumps(expected(out), indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
