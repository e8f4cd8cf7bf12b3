"""Counts of items: what is counted, how far one unit moves it, and the distribution and addresses of its noise."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from torch import nn

from lazydp.components.export.export import export
from lazydp.components.export.publish import Snapshots
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.noise_addresses import FIRST_RESERVED, MAX_TABLES, POPULARITY_TABLE
from lazydp.components.train.engine import dense
from lazydp.components.train.engine.dense import DenseLayers, DenseOptimizer
from lazydp.components.train.run import popularity as module
from lazydp.components.train.run.popularity import item_histogram, noised_counts, sensitivity
from lazydp.components.train.run.settings_check import check_fits
from lazydp.components.train.run.train import train
from lazydp.components.train.tables import schedules
from lazydp.kernels import ops, reference
from lazydp.kernels.noise_key import NoiseKey
from lazydp.kernels.reference import KEYSTREAM_TABLE

pytestmark = pytest.mark.usefixtures("one_thread")

K, ITEMS = 5, 12
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """The columns of a training split that are counted."""

    user_index: Array
    item: Array
    label: Array

    def __len__(self) -> int:
        return len(self.label)

    def kept(self, mask: Array) -> Rows:
        return Rows(self.user_index[mask], self.item[mask], self.label[mask])

    def without(self, unit: str) -> list[Rows]:
        """All its neighbours that lack one privacy unit."""
        if unit == "user":
            return [self.kept(self.user_index != user) for user in np.unique(self.user_index)]
        return [self.kept(np.arange(len(self)) != row) for row in range(len(self))]


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Users of up to K examples, positive or not, with repeats; the first has K of one item, the second of K items."""
    dice = np.random.default_rng(1)
    sizes = [K, K, *dice.integers(1, K + 1, 40)]
    user = np.repeat(np.arange(len(sizes)), sizes)
    item = dice.integers(1, ITEMS // 2, len(user)).astype(np.int32)  # the rest of the items is nobody's
    label = (dice.random(len(user)) < 0.7).astype(np.float32)
    item[:K], item[K : 2 * K] = 3, np.arange(1, K + 1)
    label[: 2 * K] = 1.0
    return Rows(user, item, label)


def histogram(rows: Any, unit: Any, *, num_items: int = ITEMS) -> npt.NDArray[np.int64]:
    return item_histogram(rows, num_items=num_items, privacy_unit=unit)


def plainly(rows: Rows, unit: str) -> list[int]:
    taken = [
        (user, item)
        for user, item, label in zip(rows.user_index.tolist(), rows.item.tolist(), rows.label.tolist(), strict=True)
        if label >= 0.5
    ]
    found = Counter(item for _, item in (set(taken) if unit == "user" else taken))
    return [found[item] for item in range(ITEMS + 1)]


# --- what is counted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "user"])
@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_the_counts_are_those_of_a_plain_count(
    unit: str, at_once: int, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    assert histogram(rows, unit).tolist() == plainly(rows, unit)
    assert plainly(rows, "user") != plainly(rows, "example")  # some pair is there twice


def test_a_user_in_two_parts_would_be_counted_twice(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the parts above."""
    monkeypatch.setattr(module, "_parts", lambda train: (slice(at, at + 3) for at in range(0, len(train), 3)))
    assert histogram(rows, "example").tolist() == plainly(rows, "example")
    assert histogram(rows, "user").tolist() != plainly(rows, "user")


def test_examples_are_counted_where_there_are_no_users(rows: Rows) -> None:
    nameless: Any = replace(rows, user_index=None)  # type: ignore[arg-type]
    assert histogram(nameless, "example").tolist() == plainly(rows, "example")
    with pytest.raises(InputError, match="no user column"):
        histogram(nameless, "user")
    itemless: Any = replace(rows, item=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="counts items, and this dataset has none"):
        histogram(itemless, "example")


# --- sensitivity -------------------------------------------------------------------------------------------------


def moves(rows: Rows, unit: str, *, counted: str) -> list[float]:
    """How far (L2) the counts of each neighbour lie from those of the whole."""
    whole = histogram(rows, counted)
    return [float(np.linalg.norm(whole - histogram(fewer, counted))) for fewer in rows.without(unit)]


@pytest.mark.parametrize("unit", ["example", "user"])
def test_one_unit_moves_the_counts_by_the_sensitivity_at_most(unit: Any, rows: Rows) -> None:
    bound = sensitivity(unit, max_examples_per_user=K)
    assert max(moves(rows, unit, counted=unit)) == pytest.approx(bound)  # and somebody does
    assert bound == (1.0 if unit == "example" else math.sqrt(K))


def test_repeated_pairs_would_move_them_further(rows: Rows) -> None:
    """The control, and what a user costs where examples are counted: k."""
    found = max(moves(rows, "user", counted="example"))
    assert found == K
    assert found > sensitivity("user", max_examples_per_user=K)


def test_users_need_a_bound() -> None:
    with pytest.raises(InputError, match="max_examples_per_user"):
        sensitivity("user", max_examples_per_user=None)
    assert sensitivity("example", max_examples_per_user=None) == 1.0


def test_the_bound_holds_for_what_ingest_writes(tiny: Any, tmp_path: Path) -> None:
    """Users with three times as many rows as count, repeats among them; each in turn left out of the Parquet."""
    bound = 4
    spec = (tiny.dataset.parent / "spec.yaml").read_text().replace("per_user: 20", f"per_user: {bound}")
    (tmp_path / "spec.yaml").write_text(spec)
    table = pq.read_table(tiny.dataset.parent / "interactions.parquet")
    item = table.column("item").to_numpy().copy()
    item[:300:2] = 7
    table = table.set_column(table.column_names.index("item"), "item", pa.array(item))

    def ingested(rows: pa.Table, name: str) -> EncodedDataset:
        pq.write_table(rows, tmp_path / f"{name}.parquet")
        ingest([str(tmp_path / f"{name}.parquet")], str(tmp_path / "spec.yaml"), tmp_path / name)
        return EncodedDataset.open(tmp_path / name)

    def counts(data: EncodedDataset) -> npt.NDArray[np.int64]:
        return histogram(data.split("train"), "user", num_items=40)

    def seen(data: EncodedDataset) -> npt.NDArray[np.int64]:
        return np.bincount(data.seen_items().values.numpy(), minlength=41)

    whole = ingested(table, "whole")
    moved, unbounded = [], []
    for user in ("u0", "u7", "u19", "u33"):
        fewer = ingested(table.filter(pc.not_equal(table.column("user"), user)), user)
        moved.append(float(np.linalg.norm(counts(whole) - counts(fewer))))
        unbounded.append(float(np.linalg.norm(seen(whole) - seen(fewer))))
    limit = sensitivity("user", max_examples_per_user=whole.manifest.max_examples_per_user)
    assert 0 < min(moved) <= max(moved) <= limit == 2.0
    # The control: all that a user has seen, which the bound does not hold for.
    assert min(unbounded) > limit


# --- noise -------------------------------------------------------------------------------------------------------

MANY = 20_000
NOISE = 1000.0  # so much that rounding to whole numbers is nothing beside it


def dataset(rows: Any, *, num_items: int, bound: int = 9) -> Any:
    return SimpleNamespace(
        items=SimpleNamespace(num_items=num_items),
        split=lambda name: {"train": rows}[name],
        manifest=SimpleNamespace(max_examples_per_user=bound),
    )


def faults(z: Array) -> set[str]:
    """What is wrong with values that should be independent standard normals; six standard errors, 1 in 10^6."""
    size = z.size
    found = {
        "mean": abs(z.mean()) > 6 / math.sqrt(size),
        "variance": abs((z**2).mean() - 1) > 6 * math.sqrt(2 / size),
        "distribution": stats.kstest(z, "norm").pvalue < 1e-6,
        "neighbouring items": abs((z[1:] * z[:-1]).mean()) > 6 / math.sqrt(size),
    }
    return {name for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("unit", ["example", "user"])
def test_every_item_gets_noise_in_proportion_to_the_sensitivity(unit: Any, rows: Rows, tiny: Any) -> None:
    config = tiny.config(privacy_unit=unit, popularity={"noise_multiplier": NOISE})
    data = dataset(rows, num_items=MANY)
    found = noised_counts(data, config, NoiseKey.for_tests(4))
    assert found is not None
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (MANY + 1,))
    released = found.double().numpy()
    assert released[0] == 0.0
    assert np.array_equal(released, np.rint(released))
    exact = histogram(rows, unit, num_items=MANY)
    noise = (released - exact)[1:]
    z = noise / (NOISE * (1.0 if unit == "example" else 3.0))
    assert faults(z) == set()
    # Nobody's items, which are nearly all, have it as well; and the controls: other scales, or none for these.
    assert faults(z[exact[1:] == 0]) == set()
    for wrong in (2 / 3, 3 / 2):
        assert faults(z * wrong) >= {"variance", "distribution"}
    assert faults(np.where(exact[1:] > 0, z, 0.0)) >= {"variance", "distribution"}
    assert "neighbouring items" in faults(np.repeat(z[::2], 2))


def test_the_noise_is_that_of_each_item_under_the_key(rows: Rows, tiny: Any) -> None:
    config, data = tiny.config(popularity={"noise_multiplier": NOISE}), dataset(rows, num_items=MANY)

    def noise(seed: int) -> Array:
        found = noised_counts(data, config, NoiseKey.for_tests(seed))
        assert found is not None
        return (found.double().numpy() - histogram(rows, "example", num_items=MANY))[1:] / NOISE

    key = NoiseKey.for_tests(4).derive("noise").tensor()
    rows_of_items = torch.arange(1, MANY + 1)
    expected = reference.noise(key, table=POPULARITY_TABLE, rows=rows_of_items, step=0, columns=1).squeeze(1)
    assert np.abs(noise(4) - expected.double().numpy()).max() < 1 / NOISE  # rounded
    assert abs((noise(4) * noise(5)).mean()) < 6 / math.sqrt(MANY)


def test_none_are_made_unless_asked_for(rows: Rows, tiny: Any) -> None:
    assert noised_counts(dataset(rows, num_items=ITEMS), tiny.config(), NoiseKey.for_tests(4)) is None


# --- addresses ---------------------------------------------------------------------------------------------------


def dense_layers(count: int, *, noise_scale: float = 0.0) -> DenseLayers:
    model = nn.Module()
    model.many = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(count)])
    optimizer = DenseOptimizer.named("sgd", learning_rate=schedules.constant(1.0))
    return DenseLayers(model, optimizer=optimizer, noise_scale=noise_scale, key=NoiseKey.for_tests(0))


def test_dense_parameters_end_below_the_table_of_the_counts() -> None:
    most = FIRST_RESERVED - MAX_TABLES
    dense_layers(most)  # the last one's number is MAX_TABLES + most - 1
    with pytest.raises(InputError, match=f"at most {most} trained dense parameters.*; found {most + 1}: freeze"):
        dense_layers(most + 1)
    assert FIRST_RESERVED <= POPULARITY_TABLE < KEYSTREAM_TABLE


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int, int]]:
    """How often every operator that takes a key is called for a table and a step."""
    found: Counter[tuple[str, int, int]] = Counter()

    def watched(name: str, operator: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            for table in named["tables"] if "tables" in named else [named["table"]]:
                found[name, table, named["step"]] += 1
            return operator(*arguments, **named)

        return call

    for name, operator in list(vars(ops).items()):
        if inspect.isfunction(operator) and {"key", "step"} <= inspect.signature(operator).parameters.keys():
            monkeypatch.setattr(ops, name, watched(name, operator))
    return found


def others_there(drawn: Counter[tuple[str, int, int]]) -> set[tuple[str, int, int]]:
    return {address for address in drawn if address[1] == POPULARITY_TABLE} - {("normal_", POPULARITY_TABLE, 0)}


def test_nothing_else_of_a_whole_run_draws_where_the_counts_do(
    tiny: Any, tmp_path: Path, drawn: Counter[tuple[str, int, int]]
) -> None:
    url = tiny.ledger()
    train(
        dataset=tiny.dataset,
        config=tiny.config(publish_every=10, popularity={"noise_multiplier": 5.0}),
        out=tmp_path / "run",
        ledger=url,
        publish=Snapshots(tmp_path / "snapshots", url).release,
    )
    export(run=tmp_path / "run", dataset=tiny.dataset, out=tmp_path / "bundle", ledger=url)
    assert drawn["normal_", POPULARITY_TABLE, 0] == 3  # two snapshots and the export
    assert others_there(drawn) == set()
    assert {name for name, _, _ in drawn} >= {"normal_", "flush_", "foreach_catch_up_bag_sum_"}
    assert min(step for name, table, step in drawn if name == "normal_" and table != POPULARITY_TABLE) == 1


def test_a_dense_parameter_at_that_table_would_be_seen(
    drawn: Counter[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the run above."""
    layers = dense_layers(2, noise_scale=1.0)
    monkeypatch.setattr(dense, "MAX_TABLES", POPULARITY_TABLE - 1)
    layers.add_noise(1)
    assert others_there(drawn) == {("normal_", POPULARITY_TABLE, 1)}


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_dataset_without_items_has_no_counts(tiny: Any, tmp_path: Path) -> None:
    table = pa.table({"clicked": [0, 1, 1, 0], "age": [20.0, 30.0, 40.0, 50.0]})
    pq.write_table(table, tmp_path / "clicks.parquet")
    (tmp_path / "spec.yaml").write_text(
        "name: clicks\nlabel: {kind: column, column: clicked}\n"
        "features: [{name: age, source: context, kind: dense, bounds: [18, 90]}]\n"
    )
    ingest([str(tmp_path / "clicks.parquet")], str(tmp_path / "spec.yaml"), tmp_path / "data")
    data = EncodedDataset.open(tmp_path / "data")
    config = tiny.config(model={"kind": "dlrm", "embedding_dim": 4})
    check_fits(data, config)
    counting = config.with_changes(popularity={"noise_multiplier": 5.0})
    with pytest.raises(InputError, match=r"popularity counts items, and dataset .* has none"):
        check_fits(data, counting)
    with pytest.raises(InputError, match="popularity counts items"):
        noised_counts(data, counting, NoiseKey.for_tests(0))
