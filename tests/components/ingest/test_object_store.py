"""Logs and datasets in an object store: as in a folder; what goes wrong is told in one line, and leaves nothing."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.ingest.stored import UNFINISHED, dataset_here
from lazydp.components.shared.errors import FormatError, InputError, IntegrityError, LazyDPError, UnavailableError
from lazydp.pipelines.cli import cli
from support.s3_store import BUCKET, Store, running_store

LOG = pa.table({"u": [1, 1, 2, 2, 2], "i": [0, 1, 2, 0, 1]})
SPEC = "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\n"
SPEC += "item: {column: i, vocabulary: {kind: integer, size: 3}}\n"
FAULTS: dict[str, tuple[dict[str, object], type[LazyDPError]]] = {
    **{f"expired after {answers}": ({"expires_after": answers}, UnavailableError) for answers in (0, 2, 4, 6, 8)},
    "torn": ({"truncated": True}, LazyDPError),
    "down": ({"failures": 10_000}, UnavailableError),
}


@pytest.fixture(scope="module")
def running() -> Iterator[Store]:
    with running_store() as found:
        yield found


@pytest.fixture
def store(running: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    """A store that holds the log in two files."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for name in running.names():
        running.client.delete_object(Bucket=BUCKET, Key=name)
    for number, part in enumerate((LOG.slice(0, 2), LOG.slice(2))):
        sink = io.BytesIO()
        pq.write_table(part, sink)
        running.put(f"log/{number}.parquet", sink.getvalue())
    running.requests.clear()
    yield running
    running.heal()


@pytest.fixture
def here(tmp_path: Path) -> EncodedDataset:
    """The dataset of the same log on this machine."""
    pq.write_table(LOG, tmp_path / "log.parquet")
    ingest([str(tmp_path / "log.parquet")], SPEC, tmp_path / "here")
    return EncodedDataset.open(tmp_path / "here")


def staged(tmp_path: Path) -> list[Path]:
    """What is left of private copies."""
    return [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]


def test_a_log_in_a_store_is_the_log_in_a_folder(store: Store, here: EncodedDataset, tmp_path: Path) -> None:
    there = ingest([store.uri("log")], SPEC, tmp_path / "there")
    assert there.fingerprint == here.manifest.fingerprint
    assert "secret" not in (tmp_path / "there" / "dataset.json").read_text()


@pytest.mark.parametrize("fault", [{"failures": 2}, {"delay_s": 0.01}], ids=["500s", "slow"])
def test_a_store_that_fails_now_and_then_is_asked_again(
    store: Store, here: EncodedDataset, fault: dict[str, float]
) -> None:
    for name, value in fault.items():
        setattr(store, name, value)
    there = ingest([store.uri("log")], SPEC, store.uri("out"))
    assert there.fingerprint == here.manifest.fingerprint
    assert store.failures == 0
    with dataset_here(store.uri("out")) as folder:
        assert EncodedDataset.open(folder).manifest.fingerprint == there.fingerprint


@pytest.mark.parametrize(("fault", "kind"), FAULTS.values(), ids=FAULTS.keys())
def test_what_goes_wrong_in_reading_is_one_line(
    store: Store, tmp_path: Path, fault: dict[str, object], kind: type[LazyDPError]
) -> None:
    for name, value in fault.items():
        setattr(store, name, value)
    with pytest.raises(kind) as caught:
        ingest([store.uri("log")], SPEC, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_told(store: Store, tmp_path: Path) -> None:
    for place in ([store.uri("nowhere")], [store.uri("nowhere/*.parquet")]):
        with pytest.raises(InputError, match=r"does not exist|no file matches") as caught:
            ingest(place, SPEC, tmp_path / "out")
        assert "secret" not in str(caught.value)


def test_a_dataset_in_a_store_is_the_dataset_in_a_folder(store: Store, here: EncodedDataset, tmp_path: Path) -> None:
    manifest = ingest([store.uri("log")], SPEC, store.uri("out"), IngestOptions(parts=2))
    assert store.names("out/") == {f"out/{name}" for name in (*manifest.files, "dataset.json")}
    assert staged(tmp_path) == []
    # The manifest is the last of what is written.
    written = [path.rpartition("/")[2] for method, path in store.requests if method in ("PUT", "POST")]
    assert [name for name in written if name][-1] == "dataset.json"
    with dataset_here(store.uri("out")) as folder:
        assert folder.stat().st_mode & 0o077 == 0
        assert {path.stat().st_mode & 0o077 for path in folder.rglob("*")} == {0}
        found = EncodedDataset.open(folder)
        assert found.manifest.fingerprint == here.manifest.fingerprint
        assert found.split("train").label.tolist() == here.split("train").label.tolist()
        del found
    assert staged(tmp_path) == []


def test_a_dataset_in_a_store_is_replaced_where_that_is_asked_for(store: Store) -> None:
    ingest([store.uri("log/0.parquet")], SPEC, store.uri("out"), IngestOptions(parts=2))
    with pytest.raises(InputError, match=r"s3://bucket/out.* holds a dataset: choose another place"):
        ingest([store.uri("log")], SPEC, store.uri("out"))
    manifest = ingest([store.uri("log")], SPEC, store.uri("out"), IngestOptions(replace=True))
    assert store.names("out/") == {f"out/{name}" for name in (*manifest.files, "dataset.json")}


@pytest.mark.parametrize("name", ["thesis.txt", "part-000/notes.arrow", "train.arrow"])
def test_what_is_no_dataset_is_never_deleted(store: Store, name: str) -> None:
    store.put(f"out/{name}", b"years of work")
    for replace in (False, True):
        with pytest.raises(InputError, match="choose another place"):
            ingest([store.uri("log")], SPEC, store.uri("out"), IngestOptions(replace=replace))
    assert store.names("out/") == {f"out/{name}"}


@pytest.mark.parametrize("answers", [0, 2, 4, 6, 8, 14])
def test_what_goes_wrong_in_writing_leaves_no_dataset(
    store: Store, here: EncodedDataset, tmp_path: Path, answers: int
) -> None:
    store.expires_after = answers
    with pytest.raises(UnavailableError) as caught:
        ingest([str(tmp_path / "log.parquet")], SPEC, store.uri("out"))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert staged(tmp_path) == []
    store.heal()
    assert "out/dataset.json" not in store.names()
    with pytest.raises(FormatError, match=r"no dataset at s3://bucket/out"), dataset_here(store.uri("out")):
        pass
    # Whatever is left is deleted by the next ingest into this place, also one that fails.
    with pytest.raises(InputError, match="no row"):
        ingest([str(tmp_path / "log.parquet")], SPEC.replace("size: 3", "first: 7, size: 3"), store.uri("out"))
    assert store.names("out/") == set()


@pytest.mark.parametrize("at", ["train.arrow", "ranges.arrow", "dataset.json"])
def test_a_kill_while_writing_leaves_nothing_that_looks_complete(
    store: Store, here: EncodedDataset, tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store stops answering for good at an object, as it does for a process that is killed there."""
    reached = threading.Event()

    def stop(method: str, path: str) -> None:
        if path.endswith(f"/out/{at}") and method in ("PUT", "POST"):
            reached.set()
            store.expires_after = 0

    store.before = stop
    with pytest.raises(UnavailableError):
        ingest([str(tmp_path / "log.parquet")], SPEC, store.uri("out"))
    assert reached.is_set()
    store.heal()
    assert f"out/{UNFINISHED}" in store.names()
    assert "out/dataset.json" not in store.names()
    manifest = ingest([str(tmp_path / "log.parquet")], SPEC, store.uri("out"))
    assert store.names("out/") == {f"out/{name}" for name in (*manifest.files, "dataset.json")}


def test_a_stored_dataset_that_was_changed_is_refused(store: Store) -> None:
    manifest = ingest([store.uri("log")], SPEC, store.uri("out"))
    store.put("out/train.arrow", b"x" * manifest.files["train.arrow"].bytes)
    with dataset_here(store.uri("out")) as folder, pytest.raises(IntegrityError, match="differs from its digest"):
        EncodedDataset.open(folder)
    store.client.delete_object(Bucket=BUCKET, Key="out/train.arrow")
    with pytest.raises(FormatError, match="torn"), dataset_here(store.uri("out")):
        pass


def test_commands_take_a_stored_dataset(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYDP_LEDGER", f"sqlite:///{tmp_path / 'ledger.db'}")
    (tmp_path / "spec.yaml").write_text(SPEC)

    def run(*words: object) -> str:
        done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "secret" not in done.output
        return done.output

    rows = ["--spec", tmp_path / "spec.yaml", "--keep-rows"]
    run("ingest", "--input", store.uri("log/0.parquet"), *rows, "--out", store.uri("out"))
    run(
        *("ingest", "--input", store.uri("log/1.parquet"), "--spec", tmp_path / "spec.yaml"),
        *("--append", store.uri("out"), "--out", store.uri("out"), "--replace"),
    )
    assert "private" in run("dataset", "show", store.uri("out"))
    run("budget", "set", "--dataset", store.uri("out"), "--epsilon", 8, "--delta", 1e-5)
    with dataset_here(store.uri("out")) as folder:
        assert EncodedDataset.open(folder).manifest.source.rows == 5
    assert staged(tmp_path) == []
