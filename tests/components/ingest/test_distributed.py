"""Ingest on an engine: the dataset of the local engine to the byte, or one clear error and nothing left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.distributed import ingest_on
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.ingest.job import Job, TaskError, error_of_task, told_errors
from lazydp.components.ingest.stored import dataset_here
from lazydp.components.shared.errors import InputError, UnavailableError
from support.hostile_engine import HostileEngine
from support.s3_store import Store, running_store

SPEC = """
name: engines
user: {{column: user, vocabulary: {{kind: hashed, buckets: 50, salt: s}}}}
item: {{column: item, vocabulary: {{kind: integer, size: 40}}}}
timestamp: at
label: {{kind: implicit}}
max_examples_per_user: 5
history: {{max_length: 4}}
users: {{path: "{folder}/users.csv", key: user}}
features:
  - {{name: place, kind: single, vocabulary: {{kind: hashed, buckets: 9, salt: p}}}}
  - {{name: price, kind: dense, bounds: [0, 9]}}
  - {{name: town, source: user, kind: single, vocabulary: {{kind: hashed, buckets: 9, salt: t}}}}
"""
NO_USERS = """
name: rows
item: {column: item, vocabulary: {kind: integer, size: 40}}
label: {kind: threshold, column: price, at_least: 0.5}
split: {kind: hashed, test_fraction: 0.2, salt: h}
features: [{name: place, kind: single, vocabulary: {kind: hashed, buckets: 9, salt: p}}]
"""
SIZE = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log in two files of small row groups, of which one user has half, an empty file, and a table of users."""
    folder = tmp_path_factory.mktemp("engines")
    generator = np.random.default_rng(0)
    users = np.where(generator.random(SIZE) < 0.5, 7, generator.integers(0, 120, SIZE))
    log = pa.table(
        {
            "user": pa.array([None if n == 0 else f"user {n}" for n in users.tolist()], pa.string()),
            "item": generator.integers(0, 41, SIZE),
            "at": generator.integers(0, 20, SIZE),
            "place": pa.array([f"place {n}" for n in generator.integers(0, 30, SIZE)]),
            "price": generator.random(SIZE).round(1),
        }
    )
    (folder / "log").mkdir()
    pq.write_table(log.slice(0, 1000), folder / "log" / "a.parquet", row_group_size=150)
    pq.write_table(log.slice(1000), folder / "log" / "b.parquet", row_group_size=400)
    pq.write_table(log.slice(0, 0), folder / "log" / "empty.parquet")
    towns = pa.table({"user": [f"user {n}" for n in range(90)], "town": [f"town {n % 7}" for n in range(90)]})
    pacsv.write_csv(towns, folder / "users.csv")
    return folder


def spec_of(folder: Path) -> str:
    return SPEC.format(folder=folder)


def content(out: Path) -> dict[str, bytes]:
    """The files of a dataset but its manifest, and what that counts."""
    manifest = EncodedDataset.open(out).manifest
    files = {
        str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "dataset.json"
    }
    return files | {"manifest": manifest.model_dump_json().encode()}


@pytest.mark.parametrize("spec", [SPEC, NO_USERS], ids=["users", "rows"])
@pytest.mark.parametrize(("parts", "piece_rows"), [(1, 1 << 20), (8, 100), (4, 500)])
def test_every_order_and_repetition_gives_the_files_of_the_local_engine(
    folder: Path, tmp_path: Path, spec: str, parts: int, piece_rows: int
) -> None:
    spec = spec.format(folder=folder) if spec is SPEC else spec
    chosen: dict[str, Any] = {"keep_rows": parts != 4, "max_rejected": 1.0}
    ingest([str(folder / "log")], spec, tmp_path / "local", IngestOptions(parts=parts, **chosen))
    expected = content(tmp_path / "local")
    for seed in range(3):
        out = tmp_path / f"out{seed}"
        engine = HostileEngine(seed=seed)
        ingest_on(engine, [str(folder / "log")], spec, out, IngestOptions(**chosen), parts=parts, piece_rows=piece_rows)
        assert engine.runs > parts
        assert content(out) == expected
        modes = {path.stat().st_mode & 0o777 for path in out.rglob("*")} | {out.stat().st_mode & 0o777}
        assert modes == {0o600, 0o700}
    assert {path.name for path in tmp_path.iterdir()} == {"local", "out0", "out1", "out2"}


def test_a_large_part_is_assembled_in_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazydp.components.ingest.memory._SMALL_BYTES", 1 << 8)
    ingest([str(folder / "log")], spec_of(folder), tmp_path / "local")
    options = IngestOptions(memory_bytes=1)
    ingest_on(HostileEngine(), [str(folder / "log")], spec_of(folder), tmp_path / "out", options, parts=1)
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_rows_are_added_to_what_an_engine_made(folder: Path, tmp_path: Path) -> None:
    log, spec = folder / "log", spec_of(folder)
    ingest([str(log)], spec, tmp_path / "whole", IngestOptions(parts=4, keep_rows=True))
    ingest_on(HostileEngine(), [str(log / "a.parquet")], spec, tmp_path / "a", IngestOptions(keep_rows=True), parts=4)
    ingest([str(log / "b.parquet")], spec, tmp_path / "both", IngestOptions(append=tmp_path / "a"))
    whole, both = (EncodedDataset.open(tmp_path / name).manifest for name in ("whole", "both"))
    assert both.fingerprint == whole.fingerprint


def test_the_number_of_parts_follows_the_rows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazydp.components.ingest.spill._GOOD_ROWS", 400)
    found = [
        ingest_on(HostileEngine(), [str(folder / "log")], spec_of(folder), tmp_path / str(rows), piece_rows=rows)
        for rows in (200, 1 << 20)
    ]
    assert found[0].fingerprint == found[1].fingerprint
    assert [len(one.parts) for one in found] == [8, 8]


@pytest.mark.parametrize("fault", [{"loses": 1}, {"repeats": 1}, {"loses": 1, "repeats": 2}], ids=str)
def test_an_engine_that_loses_or_repeats_rows_is_found_out(folder: Path, tmp_path: Path, fault: dict[str, Any]) -> None:
    engine = HostileEngine(**fault)
    with pytest.raises(UnavailableError, match="lost rows, or took some twice"):
        ingest_on(engine, [str(folder / "log")], spec_of(folder), tmp_path / "out", parts=4, piece_rows=100)
    assert list(tmp_path.iterdir()) == []


def gone(log: Path) -> None:
    (log / "b.parquet").unlink()


def grown(log: Path) -> None:
    with (log / "b.parquet").open("ab") as file:
        file.write(b"more")


def rewritten(log: Path) -> None:
    pq.write_table(pq.read_table(log / "a.parquet"), log / "b.parquet", row_group_size=7)


@pytest.mark.parametrize(("change", "told"), [(gone, "is gone"), (grown, "has changed"), (rewritten, "has changed")])
def test_a_file_that_changes_after_the_plan_is_told(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    log = tmp_path / "log"
    shutil.copytree(folder / "log", log)
    engine = HostileEngine(before_pieces=lambda: change(log))
    with pytest.raises(InputError, match=f"b.parquet {told}") as caught:
        ingest_on(engine, [str(log)], spec_of(folder), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"log"}


def test_what_cannot_be_done_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    log, spec, engine = [str(folder / "log")], spec_of(folder), HostileEngine()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for options, parts, told in (
        (IngestOptions(append=tmp_path), None, "--append is for the engine local alone"),
        (IngestOptions(), 3, "a power of two"),
        (IngestOptions(), None, "already exists"),
        (IngestOptions(replace=True), None, "holds no dataset.json"),
    ):
        with pytest.raises(InputError, match=told):
            ingest_on(engine, log, spec, tmp_path / "out", options, parts=parts)
    assert engine.runs == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_rows_that_cannot_be_used_are_reasons_as_everywhere(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder).replace("integer, size: 40", "integer, first: 100, size: 4")
    with pytest.raises(InputError, match=r"no row of .* can be used: unknown_item"):
        ingest_on(HostileEngine(), [str(folder / "log")], spec, tmp_path / "out")
    with pytest.raises(InputError, match="it has no rows"):
        ingest_on(HostileEngine(), [str(folder / "log" / "empty.parquet")], spec_of(folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_workers_without_the_folder_are_told_so(folder: Path, tmp_path: Path) -> None:
    def elsewhere() -> None:
        for path in tmp_path.glob(".lazydp-partial.*"):
            path.rename(tmp_path / "elsewhere")

    with pytest.raises(InputError, match="name a folder that all of them share"):
        ingest_on(HostileEngine(before_pieces=elsewhere), [str(folder / "log")], spec_of(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_workers_wrote_on_a_disk_of_their_own_is_missed(folder: Path, tmp_path: Path) -> None:
    class OnOtherDisks(HostileEngine):
        def run(self, job: Job) -> list[bytes]:
            results = super().run(job)
            (made,) = tmp_path.glob(".lazydp-partial.*")
            (made / "part-002" / "train.arrow").unlink()
            return results

    with pytest.raises(UnavailableError, match=r"wrote part-002/train.arrow, and it is not"):
        ingest_on(OnOtherDisks(), [str(folder / "log")], spec_of(folder), tmp_path / "out", parts=4)
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_outlives_the_job_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(HostileEngine):
        def run(self, job: Job) -> list[bytes]:
            payloads = [payload for key, payload in job.encode(job.pieces[0]) if key == 0]
            late.append(lambda: job.assemble(0, payloads))
            job.assemble(0, payloads)
            raise UnavailableError("the cluster is gone")

    late: list[Callable[[], bytes]] = []
    real = shutil.rmtree

    def removed(path: Any, **options: Any) -> None:
        # While the driver deletes the unfinished dataset, a worker that it cannot reach goes on.
        if Path(path).name.startswith(".lazydp-partial."):
            with pytest.raises(TaskError):
                late.pop()()
        real(path, **options)

    monkeypatch.setattr("lazydp.components.shared.files.shutil.rmtree", removed)
    with pytest.raises(UnavailableError, match="the cluster is gone"):
        ingest_on(Ended(), [str(folder / "log")], spec_of(folder), tmp_path / "out", parts=1)
    assert late == []
    assert list(tmp_path.iterdir()) == []


def test_errors_of_tasks_survive_what_engines_make_of_them() -> None:
    def told(error: Exception) -> Any:
        with pytest.raises(TaskError) as caught, told_errors():
            raise error
        return error_of_task(RuntimeError(f'Job aborted:\nTraceback ...\n{caught.value}\n at java.lang "x"'))

    assert repr(told(InputError('a "b": {c}'))) == repr(InputError('a "b": {c}'))
    full = told(OSError(28, "No space left on device", "/data/x"))
    assert isinstance(full, UnavailableError)
    assert "the disk is full (/data/x)" in str(full)
    assert "--parts" in str(told(MemoryError()))
    assert error_of_task(ValueError("another")) is None


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as found:
        yield found


def test_tasks_write_into_a_store(folder: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log, spec = [str(folder / "log")], spec_of(folder)
    local = ingest(log, spec, tmp_path / "local", IngestOptions(parts=4))
    made = ingest_on(HostileEngine(), log, spec, store.uri("tasks"), parts=4, piece_rows=300)
    assert made == local
    assert store.names("tasks/") == {f"tasks/{name}" for name in (*made.files, "dataset.json")}
    with dataset_here(store.uri("tasks")) as here:
        assert content(here) == content(tmp_path / "local")
    # What fails leaves nothing there, and nothing here.
    with pytest.raises(InputError, match="--replace"):
        ingest_on(HostileEngine(), log, spec, store.uri("tasks"), parts=4)
    with pytest.raises(UnavailableError, match="lost rows"):
        ingest_on(HostileEngine(loses=1), log, spec, store.uri("tasks"), IngestOptions(replace=True), parts=4)
    assert store.names("tasks/") == set()
    assert list(tmp_path.glob("lazydp-*/*")) == []
