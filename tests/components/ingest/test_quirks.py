"""Logs as somebody may have them: each is read right, or refused in one line before anything is written."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pytest

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.shared.errors import InputError

ITEMS = ["a", "b", "c", "007", "-3", "é", "true", "12345678901234567890123"]
SPEC = (
    "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\nsplit: {kind: none}\n"
    f"item: {{column: i, vocabulary: {{kind: declared, values: {ITEMS}}}}}\n"
)
TIMED = SPEC + "timestamp: t\n"
HEAD = b"u,i,t\n"
# What is in the file -> what each user took, in order.
READ: dict[str, tuple[str, bytes, dict[str, list[str]]]] = {
    "mixed time zones": (
        TIMED,
        HEAD + b"1,a,2024-01-01T12:00:00+02:00\n1,b,2024-01-01T11:00:00Z\n1,c,2024-01-01T05:30:00-05:00\n",
        {"1": ["a", "c", "b"]},
    ),
    "zone and none": (TIMED, HEAD + b"1,a,2024-01-01T12:00:00\n1,b,2024-01-01T12:30:00+01:00\n", {"1": ["b", "a"]}),
    "milliseconds": (TIMED, HEAD + b"1,a,1700000000123\n1,b,1700000000122\n", {"1": ["b", "a"]}),
    "nanoseconds": (TIMED, HEAD + b"1,a,1700000000000000003\n1,b,1700000000000000002\n", {"1": ["b", "a"]}),
    "seconds with fractions": (TIMED, HEAD + b"1,a,1700000000.5\n1,b,1700000000.25\n", {"1": ["b", "a"]}),
    "powers of ten": (TIMED, HEAD + b"1,a,1.7e9\n1,b,1.6e9\n", {"1": ["b", "a"]}),
    "before the epoch": (TIMED, HEAD + b"1,a,-5\n1,b,-7\n", {"1": ["b", "a"]}),
    "one row": (TIMED, HEAD + b"1,a,5", {"1": ["a"]}),
    "blanks in ids": (SPEC, b"u,i\n 1,a\n1 ,b\n1,c\n", {" 1": ["a"], "1 ": ["b"], "1": ["c"]}),
    "zeros before ids": (SPEC, b"u,i\n01,007\n1,a\n", {"01": ["007"], "1": ["a"]}),
    "long ids": (SPEC, b"u,i\n99999999999999999999999,12345678901234567890123\n", {"9" * 23: [ITEMS[7]]}),
    "negative ids": (SPEC, b"u,i\n-1,-3\n", {"-1": ["-3"]}),
    "truth values": (SPEC, b"u,i\ntrue,true\nTrue,a\n", {"true": ["true"], "True": ["a"]}),
    "letters of two code points are others": (SPEC, "u,i\n1,e\u0301\n1,é\n".encode(), {"1": ["é"]}),
    "a line break in an id": (SPEC, b'u,i\n"1\n2",a\n', {"1\n2": ["a"]}),
    "carriage returns": (SPEC, b"u,i\r1,a\r2,b\r", {"1": ["a"], "2": ["b"]}),
    "a delimiter at the end": (SPEC, b"u,i,\n1,a,\n", {"1": ["a"]}),
    "no user": (SPEC, b"u,i\n,a\n1,b\n", {"1": ["b"]}),
    "no item": (SPEC, b"u,i\n1,\n1,b\n", {"1": ["b"]}),
}
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "months first": (TIMED, HEAD + b"1,a,01/02/2024\n1,b,12/31/2023\n", "expected times as numbers or as 2024-01-31"),
    "a delimiter of two characters": (SPEC, b"u::i\n1::a\n", "has no column 'u'"),
    "other letters in the header": (SPEC, b"U,I\n1,a\n", "has no column 'u'"),
    "UTF-16": (SPEC, "u,i\n1,a\n".encode("utf-16"), "is not text with delimiters"),
    "Latin-1": (SPEC, "u,i\n1,é\n".encode("latin-1"), "is not text with delimiters"),
    "packed under another name": (SPEC, gzip.compress(b"u,i\n1,a\n"), "is not text with delimiters"),
    "packed by something else": (SPEC, lzma.compress(b"u,i\n1,a\n"), "is not text with delimiters"),
    "a comment first": (SPEC, b"# by me\nu,i\n1,a\n", "has no column 'u'"),
    "more fields than names": (SPEC, b"u,i\n1,a\n1,b,c\n", "Expected 2 columns, got 3"),
    "no row": (SPEC, b"u,i\n", "it has no rows"),
}


@pytest.mark.parametrize(("spec", "content", "expected"), READ.values(), ids=READ.keys())
def test_a_log_is_read_right(tmp_path: Path, spec: str, content: bytes, expected: dict[str, list[str]]) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    assert taken(tmp_path / "log.csv", spec) == expected


@pytest.mark.parametrize(("spec", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_log_is_refused(tmp_path: Path, spec: str, content: bytes, message: str) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        taken(tmp_path / "log.csv", spec)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out-log.csv").exists()


def test_packed_logs_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(b"u,i\n1,a\n") + gzip.compress(b"1,b\n"))
    with pa.CompressedOutputStream(str(tmp_path / "log.csv.zst"), "zstd") as stream:
        stream.write(b"u,i\n1,a\n1,b\n")
    for name in ("log.csv.gz", "log.csv.zst"):
        assert {user: sorted(items) for user, items in taken(tmp_path / name, SPEC).items()} == {"1": ["a", "b"]}


def test_rows_of_one_time_have_one_order_whatever_that_of_the_file(tmp_path: Path) -> None:
    rows = [b"1,a,5\n", b"1,b,5\n", b"1,c,5\n"]
    found = []
    for number, order in enumerate([rows, rows[::-1], rows[1:] + rows[:1]]):
        (tmp_path / f"{number}.csv").write_bytes(HEAD + b"".join(order))
        found.append(taken(tmp_path / f"{number}.csv", TIMED))
    assert found[0] == found[1] == found[2]


def taken(log: Path, spec: str) -> dict[str, list[str]]:
    """What each user took, in order."""
    out = log.parent / f"out-{log.name}"
    ingest([str(log)], spec, out, IngestOptions(max_rejected=1))
    data = EncodedDataset.open(out)
    values, offsets = data.histories()
    assert data.users is not None
    return {
        user: [ITEMS[code - 1] for code in values[offsets[n] : offsets[n + 1]]]
        for n, user in enumerate(data.users.to_pylist())
    }
