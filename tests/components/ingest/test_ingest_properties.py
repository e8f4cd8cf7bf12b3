"""Ingest against a plain telling of what it must do, over arbitrary logs; and what privacy rests on."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.shared.errors import InputError

SPEC = """
name: shop
user: {{column: user, vocabulary: {{kind: hashed, buckets: 50, salt: s}}}}
item: {{column: item, vocabulary: {{kind: integer, first: 1, size: 8}}}}
timestamp: at
label: {{kind: threshold, column: rating, at_least: 3}}
max_examples_per_user: {bound}
history: {{max_length: {history}}}
features:
  - {{name: device, kind: single, vocabulary: {{kind: declared, values: [phone, desktop]}}}}
  - {{name: tags, kind: list, separator: " ", vocabulary: {{kind: integer, size: 5}}}}
  - {{name: hour, kind: dense, bounds: [0, 24]}}
"""

SCHEMA = pa.schema(
    {
        "user": pa.string(),
        "item": pa.int64(),
        "at": pa.int64(),
        "rating": pa.float64(),
        "device": pa.string(),
        "tags": pa.string(),
        "hour": pa.float64(),
    }
)


def spec_text(*, bound: int = 3, history: int = 2, extra: str = "") -> str:
    """The spec of the small logs."""
    return SPEC.format(bound=bound, history=history) + extra


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table; what a row leaves out is null."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)


@dataclass(frozen=True)
class Example:
    """One encoded example as plain values."""

    label: float
    item: int
    device: int
    tags: tuple[int, ...]
    hour: float
    history: tuple[int, ...]


def examples_of(dataset: EncodedDataset, split: str) -> dict[str, list[Example]]:
    """User id -> its examples, in the order of the dataset."""
    part = dataset.split(split)
    batch = part.take(np.arange(len(part)))
    assert batch.item is not None
    assert batch.user_index is not None
    assert dataset.users is not None
    found: dict[str, list[Example]] = {}
    bags = {name: [values.tolist() for values in _cut(bag)] for name, bag in batch.bags.items()}
    for row in range(batch.size):
        user = dataset.users[int(batch.user_index[row])].as_py()
        found.setdefault(user, []).append(
            Example(
                label=float(batch.labels[row]),
                item=int(batch.item[row]),
                device=bags["device"][row][0],
                tags=tuple(bags["tags"][row]),
                hour=round(float(batch.dense[row, 0]), 6),
                history=tuple(bags["history"][row]),
            )
        )
    return found


def _cut(bags: Any) -> Iterable[Any]:
    return [bags.values[bags.offsets[i] : bags.offsets[i + 1]] for i in range(bags.size)]


FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ROW = st.fixed_dictionaries(
    {
        "user": st.sampled_from(["u1", "u2", "u3", "", None]),
        "item": st.sampled_from([1, 2, 3, 8, 9, 0, None]),
        "at": st.one_of(st.none(), st.integers(-3, 3)),
        "rating": st.sampled_from([1.0, 3.0, 5.0, None, math.nan]),
        "device": st.sampled_from(["phone", "desktop", "toaster", None]),
        "tags": st.sampled_from(["0 4", "7", "", None]),
        "hour": st.sampled_from([0.0, 12.0, 99.0, math.nan, None]),
    }
)
USABLE = st.fixed_dictionaries(
    {
        "user": st.sampled_from(["u0", "u1", "u9"]),
        "item": st.integers(1, 8),
        "at": st.integers(-3, 3),
        "rating": st.sampled_from([1.0, 5.0]),
        "device": st.sampled_from(["phone", None]),
    }
)
GOOD = {"user": "u0", "item": 1, "at": 0, "rating": 5.0}
LOG = st.lists(ROW, max_size=30).map(lambda rows: [GOOD, *rows])
BOUND = st.integers(1, 4)
HISTORY = st.integers(1, 3)


def made(rows: list[dict[str, Any]], spec: str, *, cuts: int = 1, **options: int) -> Any:
    """Ingest the rows as `cuts` files; returns (manifest, train, test) with examples by user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "in"
        folder.mkdir()
        for number, part in enumerate(np.array_split(np.arange(len(rows)), cuts)):
            pq.write_table(table_of([rows[i] for i in part]), folder / f"{number}.parquet")
        chosen: dict[str, Any] = {"max_rejected": 1, "workers": 1} | options
        manifest = ingest([str(folder)], spec, Path(name) / "out", IngestOptions(**chosen))
        dataset = EncodedDataset.open(Path(name) / "out")
        return manifest, examples_of(dataset, "train"), examples_of(dataset, "test")


def reason_against(row: dict[str, Any]) -> str | None:
    if not row["user"]:
        return "null_user"
    if row["item"] is None:
        return "null_item"
    if not 1 <= row["item"] <= 8:
        return "unknown_item"
    if row["at"] is None:
        return "bad_timestamp"
    if row["rating"] is None or math.isnan(row["rating"]):
        return "bad_label"
    return None


def expected(rows: list[dict[str, Any]], *, bound: int, history: int) -> tuple[Any, Any, Counter[str]]:
    """The same as ingest for users whose rows all have distinct times, written the plain way."""
    rejected: Counter[str] = Counter()
    by_user: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        reason = reason_against(row)
        if reason is not None:
            rejected[reason] += 1
        else:
            by_user.setdefault(row["user"], []).append(row)
    train: dict[str, list[Example]] = {}
    test: dict[str, list[Example]] = {}
    for user, own in by_user.items():
        own.sort(key=lambda row: row["at"])
        liked: list[int] = []
        encoded = []
        for row in own:
            encoded.append(encode(row, tuple(liked[-history:])))
            if row["rating"] >= 3:
                liked.append(row["item"])
        if len(own) > 1:
            test[user] = [encoded.pop()]
        train[user] = encoded[-bound:]
        rejected["over_max_examples_per_user"] += max(0, len(encoded) - bound)
    return train, test, +rejected


def encode(row: dict[str, Any], history: tuple[int, ...]) -> Example:
    hour = row.get("hour")
    hour = 12.0 if hour is None or math.isnan(hour) else min(hour, 24.0)
    tags = {"0 4": (1, 5), "7": (0,)}.get(row.get("tags") or "", ())
    device = {"phone": 1, "desktop": 2}.get(row.get("device") or "", 0)
    return Example(
        label=float(row["rating"] >= 3), item=row["item"], device=device, tags=tags, hour=hour / 12 - 1, history=history
    )


@FEW
@given(LOG, BOUND, HISTORY)
def test_ingest_does_what_is_told_plainly(rows: list[dict[str, Any]], bound: int, history: int) -> None:
    times: dict[Any, int] = Counter()
    rows = [dict(row) for row in rows]
    for row in rows:
        # Distinct times for a user's rows, so that there is one right order.
        times[row["user"]] += 1
        row["at"] = None if row["at"] is None else row["at"] * 100 + times[row["user"]]
    manifest, train, test = made(rows, spec_text(bound=bound, history=history))
    assert (train, test, Counter(manifest.rejected)) == expected(rows, bound=bound, history=history)
    assert manifest.source.rows == len(rows)
    assert sum(manifest.rejected.values()) + manifest.counts.train + manifest.counts.test == len(rows)


@FEW
@given(LOG, BOUND, st.sampled_from(["", "selection: sample\n", "split: {kind: none}\n", "split: {kind: hashed}\n"]))
def test_no_user_contributes_more_than_the_bound(rows: list[dict[str, Any]], bound: int, extra: str) -> None:
    manifest, train, _ = made(rows, spec_text(bound=bound, extra=extra))
    assert max((len(examples) for examples in train.values()), default=0) <= bound
    assert manifest.max_examples_per_user == bound
    assert manifest.counts.max_examples_of_a_user <= bound


@FEW
@given(LOG, st.randoms(use_true_random=False), st.sampled_from(["", "selection: sample\n"]))
def test_order_files_partitions_and_workers_change_nothing(rows: list[dict[str, Any]], random: Any, extra: str) -> None:
    spec = spec_text(bound=2, extra=extra)
    manifest, train, test = made(rows, spec)
    shuffled = list(rows)
    random.shuffle(shuffled)
    other, other_train, other_test = made(shuffled, spec, cuts=3, memory_bytes=1, workers=3, parts=8)
    assert (other.fingerprint, other.source.digest) == (manifest.fingerprint, manifest.source.digest)
    assert other.rejected == manifest.rejected
    assert (list(other_train.items()), list(other_test.items())) == (list(train.items()), list(test.items()))


@FEW
@given(LOG, st.sampled_from(["", "selection: sample\n", "split: {kind: hashed}\n"]))
def test_removing_a_user_changes_that_user_only(rows: list[dict[str, Any]], extra: str) -> None:
    spec = spec_text(bound=2, extra=extra)
    _, train, test = made(rows, spec)
    manifest, without_train, without_test = made([row for row in rows if row["user"] != "u1"], spec)
    train.pop("u1", None)
    test.pop("u1", None)
    assert (without_train, without_test) == (train, test)
    # Nothing public moved either: sizes of tables, scales, lists.
    assert manifest.spec == made(rows, spec)[0].spec


@FEW
@given(LOG, USABLE)
def test_another_row_shows_in_the_fingerprint(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    spec = spec_text(bound=1000, extra="split: {kind: none}\n")
    assert made(rows, spec)[0].fingerprint != made([*rows, row], spec)[0].fingerprint
    assert made(rows, spec)[0].source.digest != made([*rows, row], spec)[0].source.digest


def test_two_specs_of_one_log_agree_in_its_digest_only() -> None:
    rows = [{**GOOD, "user": f"u{i % 3}", "item": 1 + i % 8, "at": i} for i in range(20)]
    one, two = made(rows, spec_text(bound=2))[0], made(rows, spec_text(bound=3))[0]
    assert one.fingerprint != two.fingerprint
    assert one.source.digest == two.source.digest


def test_users_have_ids_that_can_be_asked_for() -> None:
    rows = [{**GOOD, "user": "é" * 256}, {**GOOD, "user": "é" * 257}, GOOD]
    manifest, train, _ = made(rows, spec_text(bound=9, extra="split: {kind: none}\n"))
    assert manifest.rejected["long_user"] == 1
    assert sum(map(len, train.values())) == 2


def test_nothing_usable_is_told_with_reasons() -> None:
    with pytest.raises(InputError, match=r"no row of .* can be used: .*null_user 1.*unknown_item 1"):
        made([{"user": None}, {"user": "u", "item": 77}], spec_text())


def test_equal_rows_of_a_user_all_count() -> None:
    manifest, train, test = made([GOOD] * 5, spec_text(bound=9))
    assert (len(train["u0"]), len(test["u0"])) == (4, 1)
    assert manifest.rejected == {}
