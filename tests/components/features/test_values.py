"""One text form for every scalar value, whatever holds it: in a log, in side tables, in a vocabulary, in a request."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lazydp.components.features.request import encode_requests
from lazydp.components.features.values import canonical_text, scalar_text, to_numbers
from lazydp.components.features.vocabulary import hash_code
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import InputError

NOON = datetime.datetime(2024, 1, 31, 12)
UTC_NOON = NOON.replace(tzinfo=datetime.UTC)
SOME_UUID = uuid.UUID("12345678-90ab-cdef-1234-567890abcdef")

# What a column holds -> the text that stands for it everywhere.
FORMS: dict[str, tuple[pa.Array, str]] = {
    **{
        f"{kind}": (pa.array([5], kind), "5")
        for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
    },
    **{f"{kind}": (pa.array([5.0], kind), "5") for kind in (pa.float16(), pa.float32(), pa.float64())},
    **{
        f"{kind}": (pa.array([Decimal("5.00")], kind), "5")
        for kind in (pa.decimal128(20, 10), pa.decimal256(50, 10), pa.decimal128(5, 2), pa.decimal32(5, 2))
    },
    **{f"{kind}": (pa.array(["007"], kind), "007") for kind in (pa.string(), pa.large_string(), pa.string_view())},
    **{f"{kind}": (pa.array([b"ab"], kind), "ab") for kind in (pa.binary(), pa.large_binary(), pa.binary_view())},
    "fixed binary": (pa.array([b"ab"], pa.binary(2)), "ab"),
    "dictionary of text": (pa.array(["a"]).dictionary_encode(), "a"),
    "dictionary of integers": (pa.array([5]).dictionary_encode(), "5"),
    "dictionary of views": (pa.array(["a"], pa.string_view()).dictionary_encode(), "a"),
    "runs": (pc.run_end_encode(pa.array([5])), "5"),
    "uuid": (pa.array([SOME_UUID]), str(SOME_UUID)),
    "boolean": (pa.array([True]), "true"),
    "date32": (pa.array([NOON.date()], pa.date32()), "2024-01-31"),
    "date64": (pa.array([NOON.date()], pa.date64()), "2024-01-31"),
    **{
        f"timestamp {unit}": (pa.array([NOON], pa.timestamp(unit)), "2024-01-31 12:00:00")
        for unit in ("s", "ms", "us", "ns")
    },
    **{
        f"timestamp {unit} of {zone}": (pa.array([UTC_NOON], pa.timestamp(unit, zone)), "2024-01-31 12:00:00Z")
        for unit, zone in (("us", "UTC"), ("ns", "America/New_York"))
    },
    "timestamp with a fraction": (
        pa.array([NOON.replace(microsecond=500_000)], pa.timestamp("ns")),
        "2024-01-31 12:00:00.5",
    ),
    "time": (pa.array([datetime.time(12, 20)], pa.time64("us")), "12:20:00"),
    "fraction": (pa.array([2.5]), "2.5"),
    "small fraction": (pa.array([1e-7]), "1e-7"),
    "decimal fraction": (pa.array([Decimal("2.50")], pa.decimal128(9, 4)), "2.5"),
    "small decimal": (pa.array([Decimal("0.0000001")], pa.decimal128(20, 10)), "1e-7"),
    "small decimal of five digits": (pa.array([Decimal("0.00001")], pa.decimal128(20, 10)), "0.00001"),
    "decimal of negative scale": (pa.array([Decimal("1200")], pa.decimal128(9, -2)), "1200"),
    "largest uint64": (pa.array([2**64 - 1], pa.uint64()), "18446744073709551615"),
    "large float": (pa.array([1e22]), "10000000000000000000000"),
    "negative zero": (pa.array([-0.0]), "0"),
}

# Types that pyarrow does not write to Parquet.
NOT_IN_PARQUET = {
    str(kind)
    for kind in (pa.decimal128(9, -2), pa.dictionary(pa.int32(), pa.string_view()), pa.binary_view(), pa.string_view())
}


@pytest.mark.parametrize(("array", "text"), FORMS.values(), ids=FORMS.keys())
def test_every_type_has_one_text_form(array: pa.Array, text: str) -> None:
    assert canonical_text(array).to_pylist() == [text]
    assert canonical_text(pa.chunked_array([array, array])).to_pylist() == [text, text]
    with_null = array if isinstance(array, pa.ExtensionArray) else pa.concat_arrays([array, pa.nulls(1, array.type)])
    assert canonical_text(with_null).to_pylist() == [text, None][: len(with_null)]


@pytest.mark.parametrize(("array", "text"), FORMS.values(), ids=FORMS.keys())
def test_log_users_items_vocabulary_and_request_agree(tmp_path: Path, array: pa.Array, text: str) -> None:
    # Old types that Parquet cannot store come from elsewhere; the rest goes all the way.
    stored = array
    if pa.types.is_run_end_encoded(array.type) or str(array.type) in NOT_IN_PARQUET:
        stored = pa.array([text])
    log = pa.table({"user": stored, "item": stored, "feature": stored})
    pq.write_table(pa.concat_tables([log, log]), tmp_path / "log.parquet")
    pq.write_table(pa.table({"user": stored, "seen": [text]}), tmp_path / "users.parquet")
    pq.write_table(pa.table({"item": stored, "title": ["t"]}), tmp_path / "items.parquet")
    (tmp_path / "list.txt").write_bytes(f"\ufeff{text}\r\n".encode())
    spec = (
        "name: a\nlabel: {kind: implicit}\n"
        "user: {column: user, vocabulary: {kind: hashed, buckets: 1000000, salt: s}}\n"
        "item: {column: item, vocabulary: {kind: declared, table: items}, title: title}\nhistory: {max_length: 3}\n"
        f"users: {{path: {tmp_path}/users.parquet, key: user}}\nitems: {{path: {tmp_path}/items.parquet, key: item}}\n"
        "features:\n"
        "  - {name: seen, source: user, kind: single, vocabulary: {kind: hashed, buckets: 9999, salt: s}}\n"
        f"  - {{name: feature, kind: single, vocabulary: {{kind: declared, file: {tmp_path}/list.txt}}}}\n"
    )
    ingest([str(tmp_path / "log.parquet")], spec, tmp_path / "out")
    dataset = EncodedDataset.open(tmp_path / "out")
    assert dataset.users is not None
    assert dataset.users.to_pylist() == [text]
    assert dataset.item_table is not None
    assert dataset.item_table.column("item").to_pylist() == [text]
    batch = dataset.split("train").take(np.arange(1))
    request = encode_requests(
        dataset.spec, dataset.vocabularies, users=[text], histories=[[text]], features=[{"seen": text, "feature": text}]
    )
    user = hash_code(text, buckets=1_000_000, salt="s")
    for encoded in (batch, request):
        assert encoded.bags["user"].values.tolist() == [user]
        assert encoded.bags["feature"].values.tolist() == [1]
        assert encoded.bags["seen"].values.tolist() == [hash_code(text, buckets=9999, salt="s")]
    assert batch.item is not None
    assert batch.item.tolist() == [1]
    assert request.bags["history"].values.tolist() == [1]


REFUSED = {
    "bytes": pa.array([b"\xff"]),
    "fixed bytes": pa.array([SOME_UUID.bytes], pa.binary(16)),
    "duration": pa.array([5], pa.duration("s")),
    "interval": pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
    "list": pa.array([[5]]),
    "struct": pa.array([{"a": 5}]),
    "map": pa.array([[("a", 5)]], pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("array", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_text_is_refused_in_every_place(tmp_path: Path, array: pa.Array) -> None:
    with pytest.raises(ValueError, match=r"expected single values, found|cannot be read as text"):
        canonical_text(array)
    if not pa.types.is_interval(array.type):  # Parquet cannot store it
        fine = pa.array(["1"] * len(array))
        pq.write_table(pa.table({"bad": array, "fine": fine}), tmp_path / "log.parquet")
        spec = (
            "name: a\nlabel: {{kind: implicit}}\nuser: {{column: {user}, embed: false}}\n"
            "item: {{column: {item}, vocabulary: {{kind: declared, table: items}}}}\n"
            f"items: {{{{path: {tmp_path}/log.parquet, key: {{key}}}}}}\n"
        )
        for places in ({"user": "bad"}, {"item": "bad"}, {"key": "bad"}):
            text = spec.format(**({"user": "fine", "item": "fine", "key": "fine"} | places))
            with pytest.raises(InputError, match=r"column|vocabulary of item") as caught:
                ingest([str(tmp_path / "log.parquet")], text, tmp_path / "out")
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1.0, "a"], ["1", "a"]),
        ([5, "6", None, ""], ["5", "6", None, None]),
        ([True, "x"], ["true", "x"]),
        ([2**70, 1], [str(2**70), "1"]),
        ([SOME_UUID, 1], [str(SOME_UUID), "1"]),
        ([Decimal("1.50"), "b"], ["1.5", "b"]),
        ([1e-7, "b"], ["1e-7", "b"]),
    ],
)
def test_mixed_kinds_in_a_request_keep_their_own_form(values: list[Any], texts: list[str | None]) -> None:
    assert canonical_text(values).to_pylist() == texts
    assert [scalar_text(value) for value in values] == texts


def test_numbers_of_truth_values_and_decimals() -> None:
    np.testing.assert_array_equal(to_numbers(pa.array([True, False])), to_numbers(["true", "false"]))
    np.testing.assert_array_equal(to_numbers(pa.array([Decimal("2.50")])), [2.5])
    with pytest.raises(ValueError, match="no value"):
        canonical_text([object(), "x"])
