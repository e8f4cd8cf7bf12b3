"""The built-in sample: always the same, and with something to learn."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.sample.cli import command
from lazydp.components.sample.sample import SampleSize, _items_table, _world, make_sample
from lazydp.components.shared.errors import InputError

SMALL = SampleSize(users=50, items=200, interactions=1000)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "sample"
    make_sample(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(sample: Path) -> EncodedDataset:
    ingest([str(sample / "interactions.parquet")], str(sample / "spec.yaml"), sample.parent / "dataset")
    return EncodedDataset.open(sample.parent / "dataset")


def test_size_and_shape(sample: Path) -> None:
    log = pq.read_table(sample / "interactions.parquet")
    assert log.column_names == ["user_id", "item_id", "timestamp", "device"]
    assert log.num_rows == 200_000
    pairs = log.group_by(["user_id", "item_id"]).aggregate([])
    assert pairs.num_rows == log.num_rows, "nobody takes an item twice"
    assert pq.read_table(sample / "users.parquet").num_rows == 2000
    assert pq.read_table(sample / "items.parquet").num_rows == 3000


def test_every_value_is_known_to_the_spec(dataset: EncodedDataset) -> None:
    assert set(dataset.manifest.rejected) == {"over_max_examples_per_user"}
    assert dataset.manifest.counts.users == dataset.manifest.counts.test == 2000
    batch = dataset.split("train").take(np.arange(5000))
    for name in ("region", "device"):
        assert (batch.bags[name].values > 0).all()
    assert (dataset.items.bags["category"].values[1:] > 0).all()


def hit_rate(scores: np.ndarray, taken: np.ndarray, users: np.ndarray, items: np.ndarray) -> float:
    """HR@10 over the whole catalogue less what each user has taken."""
    own = np.arange(len(users))
    scores = np.where(taken[users] > 0, -np.inf, scores[users])
    scores[:, 0] = -np.inf
    target = scores[own, items]
    return float(((scores > target[:, None]).sum(1) < 10).mean())


def test_tastes_predict_clearly_more_than_popularity(dataset: EncodedDataset) -> None:
    seen, test = dataset.seen_items(), dataset.split("test")
    taken = np.zeros((dataset.num_users, dataset.items.num_items + 1), dtype=np.float32)
    taken[np.repeat(np.arange(dataset.num_users), seen.lengths().numpy()), seen.values.numpy()] = 1
    popularity = taken.sum(0)
    together = taken.T @ taken
    norm = np.sqrt(np.diag(together)) + 1e-9
    similar = together / norm[:, None] / norm
    np.fill_diagonal(similar, 0)
    assert test.item is not None
    assert test.user_index is not None
    by_popularity = hit_rate(np.tile(popularity, (len(taken), 1)), taken, test.user_index, test.item)
    by_neighbours = hit_rate(taken @ similar, taken, test.user_index, test.item)
    assert 0.03 < by_popularity < 0.12
    assert by_neighbours > 2.5 * by_popularity
    # Skewed, as interaction logs are: a tenth of the items has more than a third of the interactions.
    assert np.sort(popularity)[::-1][:300].sum() > popularity.sum() / 3


def explained(features: np.ndarray, rest: np.ndarray) -> float:
    """Share of `rest` [items, d] that a linear function of `features` explains."""
    fitted = features @ np.linalg.lstsq(features, rest, rcond=None)[0]
    return float(np.square(fitted).sum() / np.square(rest).sum())


def test_what_is_told_of_books_says_nothing_of_their_own_distance() -> None:
    """Features come before the latent vectors; computed from these, they would give away what is to be learned."""
    dice = np.random.default_rng(1)
    world = _world(dice, SampleSize())
    shelves = np.eye(world.shelf.max() + 1)[world.shelf]
    rest = world.items - shelves @ np.linalg.lstsq(shelves, world.items, rcond=None)[0]
    tags = _items_table(dice, world).column("tags").to_pylist()
    told = np.array([[f"shelf-{shelf}" in row.split() for shelf in range(shelves.shape[1])] for row in tags], float)
    # Of as many features that are noise as much is explained by chance: 60 of 3,000.
    assert explained(told, rest) < 2 * told.shape[1] / len(told)
    # The controls: what is told does say where a book lies, and features made of the vectors would be found out.
    assert explained(told, world.items) > 0.2
    leaning = np.argsort(-(world.items @ dice.normal(size=(world.items.shape[1], 24))), axis=1)[:, :3]
    leaked = np.zeros((len(told), 24))
    np.put_along_axis(leaked, leaning, 1.0, axis=1)
    assert explained(leaked, rest) > 5 * 24 / len(told)


def test_a_seed_makes_one_sample(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_sample(tmp_path / name, seed=seed, size=SMALL)
    a, b, c = (pq.read_table(tmp_path / name / "interactions.parquet") for name in "abc")
    assert a.equals(b)
    assert not a.equals(c)


def test_the_command_makes_other_sizes(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "s"), "--users", "20", "--items", "40", "--interactions", "100"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "100 interactions of 20 users with 40 items" in result.output
    assert pq.read_table(tmp_path / "s" / "interactions.parquet").num_rows == 100


def test_sizes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose at most 25"):
        SampleSize(users=10, items=10, interactions=26)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        make_sample(tmp_path / "s", size=SMALL)


def test_the_component_calls_the_same_function(tmp_path: Path) -> None:
    dsl = pytest.importorskip("kfp.dsl")
    from lazydp.components.sample.component import sample_data

    artifact = dsl.Dataset(uri=str(tmp_path / "artifact"))
    artifact.path = str(tmp_path / "artifact")
    sample_data.python_func(sample=artifact, seed=3)
    assert {path.name for path in (tmp_path / "artifact").iterdir()} >= {
        "interactions.parquet",
        "users.parquet",
        "items.parquet",
        "spec.yaml",
    }
