"""Held-out items among the candidates of a file: ranks known by hand, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from lazydp.components.evaluate.candidates import read_candidates
from lazydp.components.evaluate.evaluate import _rank_both
from lazydp.components.features.batch import Batch
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import InputError

SPEC = """
name: known
user: {column: user, vocabulary: {kind: hashed, buckets: 16, salt: known}}
item: {column: item, vocabulary: {kind: integer, size: 30, first: 1}}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 50
"""
# user -> items in order of time; the last is held out
TAKEN = {"a": [1, 2, 3], "b": [1, 30], "c": [5, 25]}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    folder = tmp_path_factory.mktemp("known")
    rows = [(user, item) for user, items in TAKEN.items() for item in items]
    users, items = zip(*rows, strict=True)
    pq.write_table(pa.table({"user": users, "item": items, "at": range(len(rows))}), folder / "log.parquet")
    (folder / "spec.yaml").write_text(SPEC)
    ingest([str(folder / "log.parquet")], str(folder / "spec.yaml"), folder / "dataset")
    return EncodedDataset.open(folder / "dataset")


def write(path: Path, pairs: list[tuple[str, int]]) -> Path:
    path.write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item in pairs))
    return path


def descending(batch: Batch) -> Tensor:
    """Item 30 first, item 1 last."""
    return torch.arange(31.0).expand(batch.size, -1)


def test_held_out_items_are_ranked_among_the_candidates_alone(known: EncodedDataset, tmp_path: Path) -> None:
    pairs = [("a", 3), ("a", 2), ("a", 29), ("a", 28), ("b", 29), ("nobody", 4)]
    candidates = read_candidates(write(tmp_path / "candidates.csv", pairs), known)
    users = known.users.to_pylist() if known.users is not None else []
    assert candidates.take(torch.tensor([users.index("a")])).values.tolist() == [3, 2, 29, 28]
    model, _ = _rank_both(descending, known, known.split("test"), candidates)
    # c has no candidates. a: 3 behind 29 and 28 (2 was taken, 3 is the item itself). b: 30 before 29.
    assert model.users == 2
    assert model.auc == pytest.approx(np.mean([1 - 2 / 2, 1]))
    everything, _ = _rank_both(descending, known, known.split("test"))
    assert everything.users == 3
    assert everything.auc != model.auc


@pytest.mark.parametrize(
    ("pairs", "message"), [([("a", 31)], "item '31' is not in the catalogue"), ([("nobody", 4)], "no user of dataset")]
)
def test_candidates_of_another_dataset_are_refused(
    known: EncodedDataset, tmp_path: Path, pairs: list[tuple[str, int]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_candidates(write(tmp_path / "candidates.csv", pairs), known)


def test_a_missing_column_is_named(known: EncodedDataset, tmp_path: Path) -> None:
    (tmp_path / "candidates.csv").write_text("user,thing\na,1\n")
    with pytest.raises(InputError, match=r"no column 'item', which item\.column"):
        read_candidates(tmp_path / "candidates.csv", known)
