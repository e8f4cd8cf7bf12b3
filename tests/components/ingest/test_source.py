"""Where data comes from, and how mistakes about it are told."""

from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.ingest.locations import open_location, resolve_location
from lazydp.components.ingest.manifest import DatasetManifest
from lazydp.components.ingest.source import RowSource
from lazydp.components.shared.errors import InputError

SPEC = """
name: shop
user: {column: user, embed: false}
item: {column: item, vocabulary: {kind: declared, file: items.csv, column: id}}
label: {kind: implicit}
"""
LOG = pa.table({"user": [1, 1, 2, 2, 2], "item": ["a", "b", "a", "b", "c"]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(LOG, tmp_path / "log.parquet")
    (tmp_path / "items.csv").write_text('id,name\na,"A, first"\nb,B\nc,\n')
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def test_files_folders_and_uris_are_one_log(folder: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    (parts / "deep").mkdir(parents=True)
    (parts / "_temporary").mkdir()
    pq.write_table(LOG.slice(0, 2), parts / "1.parquet")
    pq.write_table(LOG.slice(2), parts / "deep" / "2.parquet")
    pq.write_table(LOG, parts / "_temporary" / "3.parquet")
    (parts / "_SUCCESS").write_text("")
    memory = fsspec.filesystem("memory")
    for name in ("spec.yaml", "items.csv", "log.parquet"):
        memory.pipe(f"/bucket/{name}", (folder / name).read_bytes())
    ways = [
        ([str(folder / "log.parquet")], str(folder / "spec.yaml")),
        ([str(parts)], str(folder / "spec.yaml")),
        ([str(parts / "1.parquet"), str(parts / "deep")], str(folder / "spec.yaml")),
        ([(folder / "log.parquet").as_uri()], (folder / "spec.yaml").as_uri()),
        (["memory://bucket/log.parquet"], "memory://bucket/spec.yaml"),
    ]
    made = [ingest(inputs, spec, tmp_path / f"out{n}") for n, (inputs, spec) in enumerate(ways)]
    assert len({manifest.fingerprint for manifest in made}) == 1
    assert made[0].counts.train == 3


def test_a_spec_may_be_text(folder: Path, tmp_path: Path) -> None:
    text = SPEC.replace("items.csv", str(folder / "items.csv"))
    assert ingest([str(folder / "log.parquet")], text, tmp_path / "out").counts.items == 3


def test_side_tables_are_read_as_text_with_their_types_left_out(tmp_path: Path) -> None:
    (tmp_path / "u.user").write_text('user_id:token\tage:float\tname:token_seq\n007\t3.0\t"Q\n8\t\tR S\n')
    source = RowSource.open([str(tmp_path / "u.user")])
    table = source.table(source.column_names)
    assert table.to_pydict() == {"user_id": ["007", "8"], "age": ["3.0", None], "name": ['"Q', "R S"]}


def test_relative_paths_start_from_the_spec() -> None:
    assert resolve_location("a/b", "/x") == "/x/a/b"
    assert resolve_location("/a", "/x") == "/a"
    assert resolve_location("s3://b/a", "/x") == "s3://b/a"
    assert resolve_location("a", "s3://b/c/") == "s3://b/c/a"


def mistaken(folder: Path, *, spec: str = SPEC, log: pa.Table | None = None, inputs: list[str] | None = None) -> str:
    """The message for this mistake; nothing is left behind."""
    if log is not None:
        pq.write_table(log, folder / "log.parquet")
    (folder / "spec.yaml").write_text(spec)
    with pytest.raises(InputError) as caught:
        ingest(inputs or [str(folder / "log.parquet")], str(folder / "spec.yaml"), folder / "out" / "dataset")
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists() or not list((folder / "out").iterdir())
    return str(caught.value)


def test_mistakes_about_the_input_are_told_in_one_line(folder: Path) -> None:
    nowhere = str(folder / "nowhere")
    assert mistaken(folder, inputs=[nowhere]) == f"{nowhere} does not exist"
    (folder / "empty").mkdir()
    assert "holds no data file" in mistaken(folder, inputs=[str(folder / "empty")])
    assert "cannot be opened" in mistaken(folder, inputs=["gopher://x/y"])
    (folder / "torn.parquet").write_bytes((folder / "log.parquet").read_bytes()[:-20])
    assert "Parquet" in mistaken(folder, inputs=[str(folder / "torn.parquet")])
    with pytest.raises(InputError, match="no input given"):
        RowSource.open([])


def test_mistakes_about_columns_name_them_and_what_is_there(folder: Path) -> None:
    message = mistaken(folder, spec=SPEC.replace("column: user,", "column: usr,"))
    assert "has no column 'usr', which user.column of the feature spec names; it has: user, item" in message
    message = mistaken(folder, spec=SPEC + "timestamp: item\n")
    assert "column 'item' (timestamp): expected times as numbers or as 2024-01-31 12:00:00" in message
    message = mistaken(folder, log=LOG.set_column(0, "user", pa.array([[1]] * 5)))
    assert "column 'user' (user.column) holds list<" in message
    message = mistaken(folder, log=LOG.slice(0, 0))
    assert "it has no rows" in message


def test_mistakes_about_public_lists_are_told(folder: Path) -> None:
    (folder / "items.csv").write_text("id\na\na\n")
    assert "'a' stands there 2 times" in mistaken(folder)
    (folder / "items.csv").write_text("name\na\n")
    assert "has no column 'id'" in mistaken(folder)
    (folder / "items.csv").unlink()
    assert "items.csv does not exist" in mistaken(folder)
    options = IngestOptions(users=str(folder / "log.parquet"))
    (folder / "items.csv").write_text("id\na\n")
    with pytest.raises(InputError, match="the feature spec declares no users"):
        ingest([str(folder / "log.parquet")], str(folder / "spec.yaml"), folder / "out", options)


def test_a_file_that_differs_in_type_is_told(folder: Path) -> None:
    pq.write_table(LOG.set_column(0, "user", pa.array([[1]] * 5)), folder / "other.parquet")
    assert mistaken(folder, inputs=[str(folder / "log.parquet"), str(folder / "other.parquet")])


def test_an_existing_output_is_kept_unless_told(folder: Path) -> None:
    arguments = ([str(folder / "log.parquet")], str(folder / "spec.yaml"), folder / "out")
    first = ingest(*arguments)
    with pytest.raises(InputError, match="already exists"):
        ingest(*arguments)
    assert ingest(*arguments, IngestOptions(replace=True)) == first


def test_an_interrupt_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> DatasetManifest:
        raise KeyboardInterrupt

    monkeypatch.setattr("lazydp.components.ingest.ingest.finish_dataset", interrupted)
    before = sorted(folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        ingest([str(folder / "log.parquet")], str(folder / "spec.yaml"), folder / "out")
    assert sorted(folder.iterdir()) == before


def test_click_data_needs_neither_user_nor_item(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    table = pa.table({"click": generator.integers(0, 2, 500), "x": generator.normal(size=500), "c": ["q"] * 500})
    pq.write_table(table, tmp_path / "log.parquet")
    spec = (
        "name: clicks\nlabel: {kind: column, column: click}\nfeatures:\n  - {name: x, kind: dense, bounds: [-1, 1]}\n"
        "  - {name: c, kind: single, vocabulary: {kind: hashed, buckets: 5, salt: s}}\n"
    )
    ingest([str(tmp_path / "log.parquet")], spec, tmp_path / "out", IngestOptions(memory_bytes=1000))
    dataset = EncodedDataset.open(tmp_path / "out")
    train, test = dataset.split("train"), dataset.split("test")
    assert len(train) + len(test) == 500
    assert 20 < len(test) < 90
    batch = train.take(np.arange(len(train)))
    assert batch.item is None
    assert batch.user_index is None
    assert dataset.items.num_items == 0
    with pytest.raises(InputError, match="no user column"):
        train.rows_of(np.arange(1))
    with pytest.raises(InputError, match="lacks users or items"):
        dataset.seen_items()


def test_s3_locations_are_understood_without_a_network() -> None:
    filesystem, path = open_location("s3://key:secret@bucket/folder?region=eu-west-1&endpoint_override=127.0.0.1:9")
    assert filesystem.type_name == "s3"
    assert path == "bucket/folder"
