"""The encoded dataset: what it gives back, and what it refuses."""

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.ingest.ranges import read_ranges
from lazydp.components.shared.errors import FormatError, InputError, IntegrityError

SPEC = """
name: shop
user: {column: user, vocabulary: {kind: integer, size: 40}}
item: {column: item, vocabulary: {kind: declared, table: items}, title: title}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 6
history: {max_length: 4}
users: {path: users.csv, key: user}
items: {path: items.parquet, key: id}
features:
  - {name: age, source: user, kind: dense, bounds: [0, 100]}
  - {name: likes, source: user, kind: list, separator: ";", vocabulary: {kind: integer, size: 9}}
  - {name: tags, kind: list, vocabulary: {kind: integer, size: 20}}
  - {name: device, kind: single, vocabulary: {kind: declared, values: [phone, desktop]}}
  - {name: price, source: item, kind: dense, bounds: [0, 10]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    generator = np.random.default_rng(0)
    size = 600
    log = pa.table(
        {
            "user": generator.integers(0, 40, size),
            "item": [f"i{n}" for n in generator.integers(0, 30, size)],
            "at": generator.permutation(size),
            "tags": [generator.integers(0, 20, n).tolist() for n in generator.integers(0, 5, size)],
            "device": generator.choice(["phone", "desktop"], size),
        }
    )
    pq.write_table(log, folder / "log.parquet")
    items = pa.table(
        {"id": [f"i{n}" for n in range(30)], "title": [f"Item {n}" for n in range(30)], "price": range(30)}
    )
    pq.write_table(items, folder / "items.parquet")
    lines = ["user,age,likes", *(f"{n},{n},{n % 9};{n % 7}" for n in range(0, 40, 2))]
    (folder / "users.csv").write_text("\n".join(lines) + "\n")
    (folder / "spec.yaml").write_text(SPEC)
    ingest([str(folder / "log.parquet")], str(folder / "spec.yaml"), folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="module")
def in_parts(made: Path) -> Path:
    """The same log as a dataset of several parts."""
    folder = made.parent
    ingest([str(folder / "log.parquet")], str(folder / "spec.yaml"), folder / "parts", IngestOptions(parts=4))
    return folder / "parts"


def flat(batch: Any) -> dict[str, list[Any]]:
    """The batch as lists, one entry an example."""
    assert batch.item is not None
    parts = {"label": batch.labels.tolist(), "dense": batch.dense.tolist(), "item": batch.item.tolist()}
    parts["user"] = batch.user_index.tolist()
    for name, bags in batch.bags.items():
        parts[name] = [bags.values[bags.offsets[i] : bags.offsets[i + 1]].tolist() for i in range(bags.size)]
    return parts


def test_random_access_reads_what_a_full_read_reads(made: Path) -> None:
    split = EncodedDataset.open(made).split("train")
    whole = flat(split.take(np.arange(len(split))))
    rows = np.random.default_rng(1).integers(0, len(split), 500)
    assert flat(split.take(rows)) == {name: [column[row] for row in rows] for name, column in whole.items()}
    assert len(split) > 100


def test_parts_read_as_one(made: Path, in_parts: Path) -> None:
    one, several = EncodedDataset.open(made), EncodedDataset.open(in_parts)
    assert several.manifest.parts == ("part-000", "part-001", "part-002", "part-003")
    assert several.manifest.fingerprint == one.manifest.fingerprint
    assert several.manifest.counts == one.manifest.counts
    assert several.users == one.users
    for ours, theirs in zip(several.histories(), one.histories(), strict=True):
        assert (ours == theirs).all()
    for name in ("train", "test"):
        split, whole = several.split(name), one.split(name)
        # All of it, rows of one part alone, rows of all in any order, and none.
        rows = np.random.default_rng(1).integers(0, len(whole), 500)
        for some in (np.arange(len(whole)), np.array([len(whole) - 1]), rows, rows[:0]):
            assert flat(split.take(some)) == flat(whole.take(some))
        for attribute in ("label", "item", "user_index"):
            assert (getattr(split, attribute) == getattr(whole, attribute)).all()
        users = np.array([5, 0, 39 % one.num_users])
        assert all((a == b).all() for a, b in zip(split.rows_of(users), whole.rows_of(users), strict=True))


def test_the_ranges_add_up_to_the_dataset(made: Path, in_parts: Path) -> None:
    ranges = read_ranges(made / "ranges.arrow")
    assert ranges == read_ranges(in_parts / "ranges.arrow")
    counts = EncodedDataset.open(made).manifest.counts
    assert sum(found.train for found in ranges) == counts.train
    assert sum(found.test for found in ranges) == counts.test
    assert sum(found.users for found in ranges) == counts.users
    assert [found.number for found in ranges] == sorted({found.number for found in ranges})
    assert len({found.digest for found in ranges}) == len(ranges) > 10


@pytest.mark.parametrize("parts", [0, 3, 1024])
def test_parts_are_a_power_of_two(parts: int) -> None:
    with pytest.raises(InputError, match=f"a power of two from 1 to 512, found {parts}"):
        IngestOptions(parts=parts)


def test_a_batch_has_what_the_spec_says(made: Path) -> None:
    dataset = EncodedDataset.open(made)
    batch = dataset.split("train").take(np.array([3, 0]))
    assert list(batch.bags) == [feature.name for feature in dataset.spec.example_features()]
    assert batch.dense.shape == (2, dataset.spec.num_dense)
    assert batch.labels.dtype == torch.float32
    for name, bags in batch.bags.items():
        rows = {f.name: f.num_rows for f in dataset.spec.example_features()}[name]
        assert bags.values.dtype == torch.int64
        assert ((bags.values >= 0) & (bags.values < rows)).all()
    assert dataset.items.num_items == 30
    assert dataset.item_table is not None
    assert dataset.item_table.column("title").to_pylist()[:2] == ["Item 0", "Item 1"]


def test_user_features_are_the_users_own(made: Path) -> None:
    dataset = EncodedDataset.open(made)
    split = dataset.split("train")
    batch = split.take(np.arange(len(split)))
    assert dataset.users is not None
    assert batch.user_index is not None
    for row in range(0, batch.size, 7):
        user = int(dataset.users[int(batch.user_index[row])].as_py())
        likes = batch.bags["likes"]
        found = likes.values[likes.offsets[row] : likes.offsets[row + 1]].tolist()
        assert batch.bags["user"].values[row] == user + 1
        # Users with odd numbers are not in the users table: missing features.
        assert found == ([user % 9 + 1, user % 7 + 1] if user % 2 == 0 else [])
        assert float(batch.dense[row, 0]) == pytest.approx(user / 50 - 1 if user % 2 == 0 else 0.0, abs=1e-6)


def test_users_lie_together(made: Path) -> None:
    dataset = EncodedDataset.open(made)
    split = dataset.split("train")
    assert split.user_index is not None
    starts, counts = split.rows_of(np.arange(dataset.num_users))
    assert (counts <= 6).all()
    assert counts.sum() == len(split)
    for user in range(dataset.num_users):
        assert (split.user_index[starts[user] : starts[user] + counts[user]] == user).all()
    some = np.array([5, 0, 3])
    assert all((ours == theirs[some]).all() for ours, theirs in zip(split.rows_of(some), (starts, counts), strict=True))


def test_seen_items_are_the_histories_source(made: Path) -> None:
    dataset = EncodedDataset.open(made)
    seen, split = dataset.seen_items(), dataset.split("test")
    batch = split.take(np.arange(len(split)))
    assert seen.size == dataset.num_users
    assert batch.user_index is not None
    history = batch.bags["history"]
    for row, user in enumerate(batch.user_index.tolist()):
        own = seen.values[seen.offsets[user] : seen.offsets[user + 1]]
        assert history.values[history.offsets[row] : history.offsets[row + 1]].tolist() == own[-4:].tolist()


def test_an_empty_batch_is_legal_and_rows_are_checked(made: Path) -> None:
    split = EncodedDataset.open(made).split("train")
    assert split.take(np.empty(0, dtype=np.int64)).size == 0
    for row in (-1, len(split)):
        with pytest.raises(IndexError, match=r"rows must lie in 0\.\."):
            split.take(np.array([row]))
    with pytest.raises(InputError, match="not 'dev'"):
        EncodedDataset.open(made).split("dev")


def test_the_dataset_is_private(made: Path) -> None:
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for path in made.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not [path for path in made.rglob("*") if path.name.startswith(".")]


def copied(made: Path, target: Path) -> Path:
    for path in made.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(made)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["train.arrow", "test.arrow", "users.arrow", "items.arrow", "vocab/item.parquet"])
def test_a_corrupted_file_is_refused(made: Path, tmp_path: Path, name: str) -> None:
    folder = copied(made, tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name} differs from its digest") as caught:
        EncodedDataset.open(folder)
    assert "\n" not in str(caught.value)
    (folder / name).write_bytes(content[:-8])
    with pytest.raises(IntegrityError, match=rf"{name} has \d+ bytes"):
        EncodedDataset.open(folder, verify=False)
    (folder / name).unlink()
    with pytest.raises(FormatError, match=f"{name} is missing"):
        EncodedDataset.open(folder)


def test_what_is_no_dataset_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no dataset at"):
        EncodedDataset.open(tmp_path)
    folder = copied(made, tmp_path / "copy")
    document = json.loads((folder / "dataset.json").read_text())
    for change, message in (
        ({"format_version": 3}, "format_version 3, this lazydp reads up to 2"),
        ({"parts": ["../elsewhere"]}, r"parts"),
        ({"parts": ["part-000"]}, r"cannot be read: .*part-000"),
        ({"counts": {}}, r"dataset\.json: counts\.train: the field is missing"),
        ({"spec": {"name": "x"}}, r"feature spec: label: the field is missing"),
    ):
        (folder / "dataset.json").write_text(json.dumps(document | change))
        with pytest.raises(FormatError, match=message):
            EncodedDataset.open(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(FormatError, match="cannot be read as JSON"):
        EncodedDataset.open(folder)


def test_opening_does_not_copy_the_examples(made: Path) -> None:
    split = EncodedDataset.open(made).split("train")
    assert not split.label.flags.writeable
    assert not split.label.flags.owndata
