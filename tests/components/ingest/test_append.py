"""New rows added to a dataset that keeps its rows: as if all had been there, and only what they touch is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from lazydp.components.ingest.cli import command
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.shared.errors import InputError, IntegrityError

SPEC = """
name: shop
user: {column: user, vocabulary: {kind: hashed, buckets: 50, salt: s}}
item: {column: item, vocabulary: {kind: integer, size: 30}}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 4
history: {max_length: 3}
users: {path: users.csv, key: user}
features:
  - {name: age, source: user, kind: dense, bounds: [0, 100]}
  - {name: tags, kind: list, vocabulary: {kind: integer, size: 20}}
"""
KEPT = IngestOptions(parts=8, keep_rows=True)


def rows_of(seed: int, users: Sequence[str], size: int) -> pa.Table:
    generator = np.random.default_rng(seed)
    return pa.table(
        {
            "user": generator.choice(users, size),
            "item": pa.array([None if n == 30 else int(n) for n in generator.integers(0, 31, size)], pa.int64()),
            # Some rows are late: they come before what is there already.
            "at": generator.integers(0, 10**6, size),
            "tags": [generator.integers(0, 20, n).tolist() for n in generator.integers(0, 4, size)],
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days of a log, the first of them as a dataset that keeps its rows."""
    folder = tmp_path_factory.mktemp("append")
    users = [f"u{number}" for number in range(80)]
    pq.write_table(rows_of(0, users, 900), folder / "monday.parquet")
    # A few users, of whom one is new.
    pq.write_table(rows_of(1, ["u3", "u17", "new"], 30), folder / "tuesday.parquet")
    (folder / "users.csv").write_text("user,age\n" + "".join(f"u{number},{number}\n" for number in range(0, 80, 3)))
    (folder / "spec.yaml").write_text(SPEC)
    made(folder, ["monday"], "monday", KEPT)
    return folder


def made(folder: Path, logs: Sequence[str], out: str, options: IngestOptions) -> Any:
    inputs = [str(folder / f"{log}.parquet") for log in logs]
    return ingest(inputs, str(folder / "spec.yaml"), folder / out, options)


def content(dataset: Path) -> dict[str, bytes]:
    paths = [path for path in dataset.rglob("*") if path.is_file() and path.name != "dataset.json"]
    return {path.relative_to(dataset).as_posix(): path.read_bytes() for path in paths}


def test_appended_is_whole_to_the_byte_and_untouched_files_are_the_same(folder: Path) -> None:
    whole = made(folder, ["tuesday", "monday"], "whole", KEPT)
    grown = made(folder, ["tuesday"], "grown", IngestOptions(append=folder / "monday"))
    assert content(folder / "grown") == content(folder / "whole")
    assert grown.fingerprint == whole.fingerprint
    assert (grown.counts, grown.rejected, grown.kept) == (whole.counts, whole.rejected, whole.kept)
    assert (grown.source.digest, grown.source.rows) == (whole.source.digest, 930)
    assert [Path(location).name for location in grown.source.locations] == ["monday.parquet", "tuesday.parquet"]
    # Three users lie in at most three of eight parts; the others are the very files of before.
    same = [(folder / d / part / "train.arrow").stat().st_ino for d in ("grown", "monday") for part in grown.parts]
    shared = sum(one == other for one, other in zip(same[: len(grown.parts)], same[len(grown.parts) :], strict=True))
    assert len(grown.parts) - 3 <= shared < len(grown.parts)
    # One family, so one budget in a ledger.
    families = [EncodedDataset.open(folder / name).manifest.family for name in ("grown", "monday")]
    assert families == ["shop", "shop"]


def test_a_dataset_grows_in_its_place(folder: Path, tmp_path: Path) -> None:
    made(folder, ["monday"], str(tmp_path / "d"), KEPT)
    words = ["--input", folder / "tuesday.parquet", "--spec", folder / "spec.yaml", "--out", tmp_path / "d"]
    words += ["--append", tmp_path / "d", "--replace"]
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "d") == content(folder / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    # And once more: the same file again would count double.
    again = CliRunner().invoke(command, [str(word) for word in words])
    assert isinstance(again.exception, InputError)
    assert "tuesday.parquet is in" in str(again.exception)


def test_memory_and_workers_change_nothing(folder: Path) -> None:
    options = IngestOptions(append=folder / "monday", memory_bytes=1, workers=3)
    made(folder, ["tuesday"], "small", options)
    assert content(folder / "small") == content(folder / "whole")


def test_what_cannot_be_added_is_refused(folder: Path, tmp_path: Path) -> None:
    append = IngestOptions(append=folder / "monday")

    def refused(match: str, *, spec: str = SPEC, rows: pa.Table | None = None, **options: Any) -> None:
        (tmp_path / "spec.yaml").write_text(spec)
        (tmp_path / "users.csv").write_text((folder / "users.csv").read_text())
        pq.write_table(rows if rows is not None else rows_of(2, ["u3"], 9), tmp_path / "log.parquet")
        chosen = IngestOptions(append=append.append, **options)
        with pytest.raises(InputError, match=match):
            ingest([str(tmp_path / "log.parquet")], str(tmp_path / "spec.yaml"), tmp_path / "out", chosen)
        assert not (tmp_path / "out").exists()

    refused("the feature spec is not the one of", spec=SPEC.replace("per_user: 4", "per_user: 5"))
    dates = rows_of(2, ["u3"], 9).set_column(2, "at", pa.array(["2024-01-31"] * 9))
    refused("times are given as dates and in .* as numbers", rows=dates)
    fractions = rows_of(2, ["u3"], 9).set_column(2, "at", pa.array([1.5] * 9))
    refused("have fractions", rows=fractions)
    (tmp_path / "others.csv").write_text("user,age\nu3,99\n")
    refused("the users table is not the one of", users=str(tmp_path / "others.csv"))
    made(folder, ["monday"], "plain", IngestOptions(parts=8))
    with pytest.raises(InputError, match="does not keep its rows: ingest the whole log, with --keep-rows"):
        made(folder, ["tuesday"], "out", IngestOptions(append=folder / "plain"))


def test_damaged_rows_are_not_built_on(folder: Path) -> None:
    made(folder, ["monday"], "damaged", KEPT)
    file = next((folder / "damaged").rglob("rows.arrow"))
    bytes_ = bytearray(file.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    file.write_bytes(bytes_)
    with pytest.raises(IntegrityError, match=r"rows\.arrow differs from its digest"):
        made(folder, ["tuesday"], "out", IngestOptions(append=folder / "damaged"))
