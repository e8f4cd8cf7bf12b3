"""Text files: what stands in a field is its value, to the letter, whatever the file looks like around it."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest import readers
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.ingest.source import RowSource
from lazydp.components.shared.errors import InputError

LONG = "x" * 3000


def read(path: Path) -> dict[str, list[str | None]]:
    source = RowSource.open([str(path)])
    found: dict[str, list[str | None]] = source.table(source.column_names).to_pydict()
    return found


CONTENT = {"id": ["007", "8"], "name": ["A, first", "B"]}
TABLES: dict[str, tuple[str, bytes]] = {
    "csv": ("i.csv", b'id,name\n007,"A, first"\n8,B\n'),
    "windows lines": ("i.csv", b'id,name\r\n007,"A, first"\r\n8,B\r\n'),
    "byte-order mark": ("i.csv", b'\xef\xbb\xbfid,name\n007,"A, first"\n8,B\n'),
    "blank first line": ("i.csv", b'\n\r\nid,name\n007,"A, first"\n8,B\n'),
    "mark and blank line": ("i.csv", b'\xef\xbb\xbf\nid,name\n007,"A, first"\n8,B\n'),
    "quoted header": ("i.csv", b'"id","name"\n007,"A, first"\n8,B\n'),
    "mark and quoted header": ("i.csv", b'\xef\xbb\xbf"id","name"\n007,"A, first"\n8,B\n'),
    "semicolons": ("i.csv", b"id;name\n007;A, first\n8;B\n"),
    "tabs": ("i.tsv", b"id\tname\n007\tA, first\n8\tB\n"),
    "tabs in csv": ("i.csv", b"id\tname\n007\tA, first\n8\tB\n"),
    "bars": ("i.txt", b"id|name\n007|A, first\n8|B\n"),
    "recbole": ("i.item", b"id:token\tname:token_seq\n007\tA, first\n8\tB\n"),
    "json lines": ("i.jsonl", b'{"id": "007", "name": "A, first"}\n\n{"id": 8, "name": "B"}\n'),
    "json lines with a mark": ("i.json", b'\xef\xbb\xbf{"id": "007", "name": "A, first"}\n{"id": 8.0, "name": "B"}\n'),
    "gzip": ("i.csv.gz", gzip.compress(b'id,name\n007,"A, first"\n8,B\n')),
    "bzip2": ("i.tsv.bz2", bz2.compress(b"id\tname\n007\tA, first\n8\tB\n")),
}


@pytest.mark.parametrize(("name", "content"), TABLES.values(), ids=TABLES.keys())
def test_one_table_in_many_spellings(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == CONTENT


def test_names_with_quotes_and_line_breaks_are_names(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text('"a ""b""","c\nd","e,f"\n01,2,\n')
    assert read(tmp_path / "i.csv") == {'a "b"': ["01"], "c\nd": ["2"], "e,f": [None]}


def test_line_breaks_within_quotes_make_no_rows_wherever_they_stand(tmp_path: Path) -> None:
    rows = [(f"{n:05d}", f"line one {LONG}\nline two, {n}" if n % 3 == 0 else f"plain {n}") for n in range(6000)]
    text = "id,name\n" + "".join(f'{key},"{name}"\n' for key, name in rows)
    assert len(text) > 1.2 * readers._BLOCK_BYTES
    (tmp_path / "i.csv").write_text(text)
    found = read(tmp_path / "i.csv")
    assert list(zip(found["id"], found["name"], strict=True)) == rows


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_of_values_end_at_line_feeds_only(tmp_path: Path, end: str) -> None:
    values = ["a\u2028b", "c\u0085d", "e\x0bf", " g "]
    (tmp_path / "v.txt").write_bytes(("\ufeff" + end.join(values) + end).encode())
    pq.write_table(pa.table({"v": values[:3] * 2, "y": [1] * 6}), tmp_path / "log.parquet")
    spec = (
        "name: a\nlabel: {kind: column, column: y}\nsplit: {kind: none}\nfeatures:\n"
        f"  - {{name: v, kind: single, vocabulary: {{kind: declared, file: {tmp_path}/v.txt}}}}\n"
    )
    ingest([str(tmp_path / "log.parquet")], spec, tmp_path / "out")
    dataset = EncodedDataset.open(tmp_path / "out")
    values_found = dataset.vocabularies["v"].values()
    assert values_found is not None
    assert values_found.to_pylist() == [*values[:3], "g"]
    batch = dataset.split("train").take(np.arange(6))
    assert sorted(batch.bags["v"].values.tolist()) == [1, 1, 2, 2, 3, 3]


SPEC = """
name: a
user: {column: user, vocabulary: {kind: hashed, buckets: 1000, salt: s}}
item: {column: item, vocabulary: {kind: integer, first: 1, size: 100}}
timestamp: at
label: {kind: threshold, column: rating, at_least: 3}
history: {max_length: 5}
"""
LOG = pa.table(
    {
        "user": ["07", "07", "8", "8", "07"],
        "item": [1, 2, 3, 1, 5],
        "at": [1_700_000_000_000_000_003, 1_700_000_000_000_000_001, 1, 2, 5],
        "rating": [5.0, 2.5, 3.0, None, 4.0],
    }
)


def as_csv(path: Path, delimiter: str) -> None:
    rows = [delimiter.join(LOG.column_names)]
    rows += [delimiter.join("" if v is None else str(v) for v in row.values()) for row in LOG.to_pylist()]
    path.write_text("\n".join(rows) + "\n")


def as_json(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in LOG.to_pylist()))


LOGS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "csv": ("log.csv", lambda path: as_csv(path, ",")),
    "tsv": ("log.tsv", lambda path: as_csv(path, "\t")),
    "json lines": ("log.jsonl", as_json),
    "parquet without an extension": ("log", lambda path: pq.write_table(LOG, path)),
}


@pytest.mark.parametrize(("name", "write"), LOGS.values(), ids=LOGS.keys())
def test_a_log_has_one_fingerprint_in_every_format(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    pq.write_table(LOG, tmp_path / "log.parquet")
    write(tmp_path / name)
    plain = ingest([str(tmp_path / "log.parquet")], SPEC, tmp_path / "plain")
    other = ingest([str(tmp_path / name)], SPEC, tmp_path / "other")
    assert other.fingerprint == plain.fingerprint
    assert other.source.digest == plain.source.digest
    assert other.source.rows == 5


def test_criteo_logs_have_no_header(tmp_path: Path) -> None:
    lines = ["\t".join([str(n % 2), *["3"] * 13, *[f"c{n}"] * 26]) for n in range(40)]
    (tmp_path / "day_0").write_text("\n".join(lines) + "\n")
    spec = (
        "name: clicks\nlabel: {kind: column, column: label}\nsplit: {kind: none}\nfeatures:\n"
        "  - {name: I1, kind: dense, bounds: [0, 10]}\n"
        "  - {name: C26, kind: single, vocabulary: {kind: hashed, buckets: 50, salt: s}}\n"
    )
    manifest = ingest([str(tmp_path / "day_0")], spec, tmp_path / "out", IngestOptions(format="criteo"))
    assert manifest.counts.train == 40
    (tmp_path / "day_0").write_text("1\t2\n")
    with pytest.raises(InputError, match="expected 40 fields a line, found 2"):
        ingest([str(tmp_path / "day_0")], spec, tmp_path / "no", IngestOptions(format="criteo"))


TORN: dict[str, tuple[str, bytes, str]] = {
    "fields": ("log.csv", b"user,item,at,rating\n1,2,3,4\n1,2\n", "cannot be read as text"),
    "not UTF-8": ("log.csv", b"user,item,at,rating\n\xff\xfe,2,3,4\n", "text"),
    "empty": ("log.csv", b"", "is empty"),
    "column twice": ("log.csv", b"user,item,at,rating,user\n1,2,3,4,5\n", "'user' more than once"),
    "json": (
        "log.jsonl",
        b'{"user": 1, "item": 2, "at": 3, "rating": 4}\n{"user": 1,\n',
        r"log\.jsonl:2: not a line of JSON",
    ),
    "json array": ("log.json", b"[1, 2]\n", r"log\.json:1: expected a JSON object a line, found list"),
    "torn gzip": (
        "log.csv.gz",
        gzip.compress(b"user,item,at,rating\n" + b"1,2,3,4\n" * 9999)[:60],
        "cannot be read|truncated",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), TORN.values(), ids=TORN.keys())
def test_torn_text_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        ingest([str(tmp_path / name)], SPEC, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_catalogue_in_csv_gives_titles_to_the_right_items(tmp_path: Path) -> None:
    titles = {"007": "Bond\nJames", "7": "Seven", "a,b": 'Quote "x"'}
    rows = "".join('"{}","{}"\n'.format(key, title.replace('"', '""')) for key, title in titles.items())
    (tmp_path / "items.csv").write_bytes(b"\xef\xbb\xbf\n" + f"id,title\n{rows}".encode())
    pq.write_table(pa.table({"user": ["1"] * 3, "item": list(titles)}), tmp_path / "log.parquet")
    spec = (
        "name: a\nlabel: {kind: implicit}\nuser: {column: user, embed: false}\n"
        "item: {column: item, vocabulary: {kind: declared, table: items}, title: title}\n"
        f"items: {{path: {tmp_path}/items.csv, key: id}}\n"
    )
    ingest([str(tmp_path / "log.parquet")], spec, tmp_path / "out")
    table = EncodedDataset.open(tmp_path / "out").item_table
    assert table is not None
    assert dict(zip(table.column("item").to_pylist(), table.column("title").to_pylist(), strict=True)) == titles


def test_integers_beyond_64_bits_are_exact_in_every_format(tmp_path: Path) -> None:
    users = [123456789012345678901234, 123456789012345678901235, -(2**63) - 1, 2**64]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"user": user, "x": 0.5}) + "\n" for user in users))
    (tmp_path / "log.csv").write_text("user,x\n" + "".join(f"{user},0.5\n" for user in users))
    texts = [str(user) for user in users]
    assert read(tmp_path / "log.jsonl")["user"] == read(tmp_path / "log.csv")["user"] == texts
