"""Record and replay on two datasets that differ in one privacy unit, through ingest, `batch_maker`, train and export.

What may differ is the noised sums, by at most what the event says. All else that can be seen is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle
from lazydp.components.export.export import export
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.sampler import PoissonSampler
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.mechanism import contributions
from lazydp.components.train.mechanism.parameters import GROUPS
from lazydp.components.train.run.batches import batch_maker
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.popularity import noised_counts, sensitivity
from lazydp.components.train.run.train import build_engine, train
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

Q, STEPS = 0.1, 5
SETTINGS: dict[str, Any] = {
    "sampling_prob": Q,
    "steps": STEPS,
    "noise_multiplier": 2.0,
    "max_grad_norm": 0.05,
    "micro_batch_size": 30,
    "dense": {"optimizer": "sgd", "learning_rate": 1.0},
    "popularity": {"noise_multiplier": 5.0},
    "checkpoint_every": 2,
}
UNITS: dict[str, dict[str, Any]] = {
    "example": {"expected_batch_size": 160},
    "user": {"privacy_unit": "user", "sampling": "user", "user_gradient": "sum", "expected_batch_size": 12},
}


@dataclass(frozen=True)
class Pair:
    """A dataset, and the same without its last privacy unit."""

    whole: Path
    without: Path

    def opened(self) -> tuple[EncodedDataset, EncodedDataset]:
        return EncodedDataset.open(self.whole), EncodedDataset.open(self.without)


@pytest.fixture(scope="module", params=UNITS)
def unit(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(unit: str, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The unit goes out of the Parquet, before ingest: of a user all rows, of an example its one."""
    folder = tmp_path_factory.mktemp(unit)
    table = pq.read_table(tiny_dataset.parent / "interactions.parquet")
    users = EncodedDataset.open(tiny_dataset).users
    assert users is not None
    of_last = pc.equal(table.column("user"), users[-1])
    if unit == "example":  # the last that is trained on: the user's very last is held out
        held_out = sorted(table.filter(of_last).column("at").to_pylist())[-1]
        latest = sorted(table.filter(of_last).column("at").to_pylist())[-2]
        assert latest != held_out
        of_last = pc.equal(table.column("at"), pa.scalar(latest))
    pq.write_table(table.filter(pc.invert(of_last)), folder / "interactions.parquet")
    ingest([str(folder / "interactions.parquet")], str(tiny_dataset.parent / "spec.yaml"), folder / "dataset")
    found = Pair(tiny_dataset, folder / "dataset")
    whole, without = (data.split("train") for data in found.opened())
    gone = len(whole) - len(without)
    assert gone == (1 if unit == "example" else 14)
    kept = np.arange(len(without))
    for name, bags in whole.take(kept).bags.items():
        assert torch.equal(bags.values, without.take(kept).bags[name].values)
    return found


@pytest.fixture(autouse=True)
def _same_memberships(monkeypatch: pytest.MonkeyPatch, pair: Pair, unit: str) -> None:
    """Both runs draw the same units; the last one, which only one of them has, in every second step."""
    whole = EncodedDataset.open(pair.whole)
    last = (whole.num_users if unit == "user" else len(whole.split("train"))) - 1

    def members(self: PoissonSampler, step: int) -> npt.NDArray[np.int64]:
        drawn = np.random.default_rng(step).random(last + 1) < Q
        drawn[last] = step % 2 == 1
        return np.flatnonzero(drawn[: self.population])

    monkeypatch.setattr(PoissonSampler, "members", members)


def shifts(pair: Pair, config: TrainConfig) -> list[float]:
    """For every step how far apart the two noised sums are, in units of their noise, where all before was the same."""
    engines, makers = [], []
    for data in pair.opened():
        key = NoiseKey.for_tests(3)
        identity = RunIdentity("run", config, data.manifest.fingerprint, "version", config.noise_multiplier)
        engines.append(build_engine(data.spec, identity, key))
        makers.append(batch_maker(data, config, key))
    found = []
    for step in range(1, config.steps + 1):
        sent = []
        engines[1].load_state_dict(engines[0].state_dict())
        for engine, make in zip(engines, makers, strict=True):
            engine.flush()
            before = parameters(engine)
            engine.step(make(step))
            engine.flush()
            after = parameters(engine)
            sent.append({group: (before[group] - after[group]) * config.expected_batch_size for group in GROUPS})
        std = {group: engines[0].privacy.noise_std(group) for group in GROUPS}
        found.append(math.hypot(*(float((sent[0][group] - sent[1][group]).norm()) / std[group] for group in GROUPS)))
    return found


def parameters(engine: Engine) -> dict[str, Tensor]:
    dense = [parameter.detach().double().flatten() for parameter in engine.model.parameters()]
    tables = [weight.double().flatten() for weight in engine.table_weights().values()]
    return {"dense": torch.cat(dense), "embeddings": torch.cat(tables)}


@pytest.mark.parametrize("max_grad_norm", [0.05, {"dense": 0.02, "embeddings": 0.05}], ids=["one norm", "by group"])
def test_the_noised_sums_differ_by_what_the_event_says(pair: Pair, unit: str, max_grad_norm: Any, tiny: Any) -> None:
    config = tiny.config(**{**SETTINGS, **UNITS[unit], "max_grad_norm": max_grad_norm})
    found = shifts(pair, config)
    assert max(found) <= (1 + 1e-3) / config.noise_multiplier
    # the unit did count, in the steps that drew it, and in no other
    assert min(found[0::2]) > 0.9 / config.noise_multiplier
    assert max(found[1::2]) == 0.0


def test_the_released_counts_differ_by_what_the_event_says(pair: Pair, unit: str, tiny: Any) -> None:
    config = tiny.config(**SETTINGS, **UNITS[unit])
    whole, without = (noised_counts(data, config, NoiseKey.for_tests(3)) for data in pair.opened())
    assert whole is not None
    assert without is not None
    apart = float((whole - without).norm())
    assert apart == pytest.approx(1.0 if unit == "example" else math.sqrt(14))
    assert apart <= sensitivity(config.privacy_unit, max_examples_per_user=20)
    noise = 5.0 * sensitivity(config.privacy_unit, max_examples_per_user=20)
    assert float(whole.std()) > noise / 2  # it is there, and the same in both


def unclipped(sq_norms: Tensor, *, max_grad_norm: float) -> Tensor:
    return torch.ones_like(sq_norms)


STEP = Engine.step


def over_the_realised_batch(self: Engine, micro_batches: Any) -> Any:
    sizes = [examples.size if examples.user_sizes is None else len(examples.user_sizes) for examples in micro_batches]
    self.privacy = replace(self.privacy, expected_batch_size=float(max(1, sum(sizes))))
    return STEP(self, micro_batches)


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [(contributions, "clip_coefficients", unclipped), (Engine, "step", over_the_realised_batch)],
    ids=["no clipping", "divided by the realised batch"],
)
def test_the_replay_catches_a_planted_bug(
    owner: Any, name: str, bug: Callable[..., Any], pair: Pair, unit: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, bug)
    config = tiny.config(**SETTINGS, **UNITS[unit])
    assert max(shifts(pair, config)) > 1.2 / config.noise_multiplier


def keys_of(node: Any) -> Any:
    """Names and nesting of a document, without its values."""
    if isinstance(node, dict):
        return {name: keys_of(value) for name, value in node.items()}
    return [keys_of(value) for value in node] if isinstance(node, list) else None


def shapes_of(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.dtype, tuple(state.shape)
    if isinstance(state, dict):
        return {name: shapes_of(value) for name, value in state.items()}
    return [shapes_of(value) for value in state] if isinstance(state, list) else type(state)


def seen_of(dataset: Path, folder: Path, tiny: Any, config: TrainConfig) -> dict[str, Any]:
    """All that a run and its release show, but for the weights, and for names, digests and times."""
    folder.mkdir()
    url = replace(tiny, dataset=dataset, folder=folder).ledger(privacy_unit=config.privacy_unit)
    run = train(dataset=dataset, config=config, out=folder / "run", ledger=url)
    with RunFolder.locked(folder / "run") as held:
        checkpoint = held.latest()
    assert checkpoint is not None
    manifest = export(run=folder / "run", dataset=dataset, out=folder / "bundle", ledger=url)
    with Ledger.open(url) as ledger:
        # Which dataset it is shows by its name, and is meant to.
        bodies = [(entry.kind, json.loads(entry.body.replace(entry.dataset, "name"))) for entry in ledger.entries()]
    tensors = {}
    for path in sorted((folder / "bundle").rglob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            tensors[path.name] = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return {
        "steps": run.step,
        "state": shapes_of(checkpoint.state),
        "spent": checkpoint.event,
        "ledger": [(kind, keys_of(body)) for kind, body in bodies],
        "events": [body["event"] for _, body in bodies if "event" in body],
        "accounts": [body["accounts"] for _, body in bodies],
        "files": sorted((entry.path, entry.size) for entry in manifest.files),
        "tensors": tensors,
        "manifest": keys_of(manifest.model_dump(mode="json")),
        # The noise as measured is a function of the released weights, which are seen anyway.
        "statement": Bundle.open(folder / "bundle").statement.model_copy(update={"realised_noise": None}),
    }


def test_nothing_else_that_is_seen_depends_on_the_unit(pair: Pair, unit: str, tiny: Any, tmp_path: Path) -> None:
    config = tiny.config(**SETTINGS, **UNITS[unit])
    found = [seen_of(data, tmp_path / data.parent.name, tiny, config) for data in (pair.whole, pair.without)]
    for what, value in found[0].items():
        assert value == found[1][what], what
    assert found[0]["steps"] == STEPS
    assert len(found[0]["events"]) == 2
    assert found[0]["tensors"]["popularity.safetensors"] == {"count": (41,)}
    # The control: a batch of which the dataset's size says how likely it is.
    sizes = [data.num_users if unit == "user" else len(data.split("train")) for data in pair.opened()]
    measured = [
        seen_of(data, tmp_path / f"measured {size}", tiny, config.with_changes(sampling_prob=6 / size))
        for data, size in zip((pair.whole, pair.without), sizes, strict=True)
    ]
    assert {what for what in found[0] if measured[0][what] != measured[1][what]} >= {"spent", "events", "statement"}
