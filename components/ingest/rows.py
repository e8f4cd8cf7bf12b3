"""One batch of interactions: its columns encoded, its rejected rows counted by reason."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.features.encode import encode_list, is_list_type, refuse_text, scale_dense
from lazydp.components.features.spec import (
    ITEM,
    ColumnLabel,
    ColumnSplit,
    DenseFeature,
    FeatureSpec,
    ImplicitLabel,
    ListFeature,
    Source,
    ThresholdLabel,
)
from lazydp.components.features.values import MAX_ID, Numbers, canonical_text, is_scalar_type, to_numbers
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.ingest.hashing import Words, as_words, hash_lists, hash_texts
from lazydp.components.ingest.readers import Reader
from lazydp.components.ingest.source import RowSource, require_columns
from lazydp.components.ingest.times import Kind, encode_times, has_parts, kind_of, kind_of_text
from lazydp.components.shared.errors import InputError
from lazydp.kernels.rows import chain, hash_decimals, sums, sums_of_pairs

USER_COLUMN = "user"
USER_HASH_COLUMN = "user_hash"
TIME_COLUMN = "time"
TIME_PART_COLUMN = "time_part"
ITEM_COLUMN = "item"
LABEL_COLUMN = "label"
TEST_COLUMN = "test"
HASH_COLUMN = "hash"
NO_COLUMN = ""
FEATURE_PREFIX = "feature:"

_BEFORE_LABEL = {USER_COLUMN, USER_HASH_COLUMN, ITEM_COLUMN, TIME_COLUMN, TIME_PART_COLUMN}

Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclasses.dataclass(frozen=True, slots=True)
class Users:
    """The users of the rows of a batch: some named users, and which of them each row is of.

    entries: int32 [n].
    names: text [d], without nulls; a user may stand there several times.
    hashes: of the names, uint64 [d].
    """

    entries: np.ndarray[Any, np.dtype[np.int32]]
    names: pa.Array
    hashes: Words


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a batch.

    rows: the rows of the batch, encoded, but for their users; without users the accepted ones, with their hash.
    users: theirs; None where the spec has none.
    accepted: bool [n], which of `rows` count; None: all.
    num_rows: rows of the batch.
    rejected: reason -> rows that were not accepted, each under the first reason that applies.
    sums: of two hashes of every row of the batch, accepted or not, modulo 2^64.
    """

    rows: pa.RecordBatch
    users: Users | None
    accepted: Mask | None
    num_rows: int
    rejected: Counter[str]
    sums: tuple[int, int]

    @property
    def num_accepted(self) -> int:
        """Rows that were accepted."""
        return self.num_rows - self.rejected.total()


@dataclasses.dataclass
class Tally:
    """Counts over batches, whatever their order."""

    num_rows: int = 0
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    sums: tuple[int, int] = (0, 0)

    def add(self, encoded: Encoded) -> None:
        """Take a batch in."""
        self.rejected += encoded.rejected
        self.add_counts(encoded.num_rows, encoded.sums)

    def add_counts(self, num_rows: int, sums: tuple[int, int]) -> None:
        """Take in rows of which only the number and the sums of their hashes are known."""
        self.num_rows += num_rows
        self.sums = ((self.sums[0] + sums[0]) % 2**64, (self.sums[1] + sums[1]) % 2**64)

    def digest(self) -> str:
        """Tells logs apart whatever their order: SHA-256 of the sums and of the number of rows."""
        content = b"".join(number.to_bytes(8, "little") for number in (*self.sums, self.num_rows))
        return hashlib.sha256(content).hexdigest()


class InteractionEncoder:
    """Turns batches of raw interactions into encoded rows; does not change, so that threads may share it.

    Encoded rows have the columns time, item (int32), label (float32, unless it is implicit), test (bool, where a column
    says so) and `feature:<name>` of every context feature, each where the spec has one; without a user also hash
    (uint64 of the row's content).
    """

    def __init__(self, spec: FeatureSpec, vocabularies: Vocabularies, source: RowSource) -> None:
        """Check that the columns are there and of a kind that the spec can read.

        Raises:
            InputError: a column is missing or of the wrong type; the message names it and the field of the spec.
        """
        self._spec = spec
        self._vocabularies = vocabularies
        wanted = list(_wanted_columns(spec))
        require_columns(wanted, source, where=source.where)
        self.columns = list(dict.fromkeys(name for name, _ in wanted))
        _check_types(spec, source, wanted)
        self.time_kind: Kind = _time_kind(spec.timestamp, source) if spec.timestamp is not None else "number"
        self._time_parts = spec.timestamp is not None and any(map(has_parts, source.types(spec.timestamp)))

    def encode(self, batch: pa.RecordBatch) -> Encoded:
        """The rows of a batch, which of them are accepted, and how many were left out for what reason."""
        columns: dict[str, pa.Array] = {}
        refused: list[tuple[str, Mask]] = []
        users = self._encode_user(batch, refused)
        items = self._encode_item(batch, columns, refused, with_hashes=users is not None)
        self._encode_time(batch, columns, refused)
        self._encode_label(batch, columns, refused)
        self._encode_split(batch, columns, refused)
        columns |= encode_features(self._spec, self._vocabularies, batch, "context")
        rows = _batch(columns, batch.num_rows)
        accepted, rejected = _accepted(refused, batch.num_rows)
        if users is not None:
            # Who took what in each raw row, before anything that a spec may choose.
            digest = sums_of_pairs(users.entries, users.hashes, items)
            return Encoded(rows, users, accepted if rejected else None, batch.num_rows, rejected, digest)
        hashes = hash_rows(rows, self._spec)
        rows = rows.append_column(HASH_COLUMN, pa.array(hashes))
        if rejected:
            rows = rows.filter(pa.array(accepted))
        return Encoded(rows, None, None, batch.num_rows, rejected, sums(hashes))

    def _encode_user(self, batch: pa.RecordBatch, refused: list[tuple[str, Mask]]) -> Users | None:
        if self._spec.user is None:
            return None
        raw = _coded(batch, self._spec.user.column, "user.column")
        name = text_of(raw.dictionary, self._spec.user.column, "user.column")
        missing = _missing(name)
        names, indices = name.fill_null("") if name.null_count else name, raw.indices
        if indices.null_count:
            # The last one stands for rows that name nobody.
            names, indices = pa.concat_arrays([names, pa.array([""])]), indices.fill_null(len(name))
            missing = np.append(missing, True)
        entries = indices.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        if missing.any():
            refused.append(("null_user", missing[entries]))
        # Bytes are never fewer than characters.
        if (pc.max(pc.binary_length(names)).as_py() or 0) > MAX_ID:
            refused.append(("long_user", _mask(pc.greater(pc.utf8_length(names), MAX_ID))[entries]))
        return Users(entries, names, hash_texts(names))

    def _encode_item(
        self, batch: pa.RecordBatch, columns: dict[str, pa.Array], refused: list[tuple[str, Mask]], *, with_hashes: bool
    ) -> Words | None:
        """Returns the hashes of the items, where there are items and `with_hashes` asks for them."""
        if self._spec.item is None:
            return None
        raw = batch.column(self._spec.item.column)
        hashes: Words | None = None
        if pa.types.is_integer(raw.type) and not pa.types.is_uint64(raw.type):
            # The text of an integer is its digits: nothing need be written out to know its code and its hash.
            values, missing = raw, _missing(raw)
            if with_hashes:
                known = raw.fill_null(0) if raw.null_count else raw
                hashes = hash_decimals(known.cast(pa.int64()).to_numpy())
                if raw.null_count:
                    hashes[missing] = hash_texts(pa.array([""]))[0]
        else:
            values = text_of(raw, self._spec.item.column, "item.column")
            missing = _missing(values)
            hashes = hash_texts(values) if with_hashes else None
        codes = self._vocabularies[ITEM].encode_column(values)
        columns[ITEM_COLUMN] = pa.array(codes)
        refused.append(("null_item", missing))
        refused.append(("unknown_item", codes == 0))
        return hashes

    def _encode_time(
        self, batch: pa.RecordBatch, columns: dict[str, pa.Array], refused: list[tuple[str, Mask]]
    ) -> None:
        if self._spec.timestamp is None:
            return
        times = encode_times(batch.column(self._spec.timestamp), self.time_kind)
        refused.append(("bad_timestamp", ~times.valid))
        columns[TIME_COLUMN] = pa.array(times.whole)
        if self._time_parts:
            columns[TIME_PART_COLUMN] = pa.array(times.part if times.part is not None else np.zeros(batch.num_rows))

    def _encode_label(
        self, batch: pa.RecordBatch, columns: dict[str, pa.Array], refused: list[tuple[str, Mask]]
    ) -> None:
        label = self._spec.label
        match label:
            case ColumnLabel():
                numbers = _numbers_of(batch, label.column)
                # A comparison with NaN is false: what is no number is refused as well.
                refused.append(("bad_label", ~((numbers >= 0) & (numbers <= 1))))
            case ThresholdLabel():
                raw = _numbers_of(batch, label.column)
                refused.append(("bad_label", np.isnan(raw)))
                if label.drop_below:
                    refused.append(("below_threshold", raw < label.at_least))
                numbers = (raw >= label.at_least).astype(np.float64)
            case _:
                return
        columns[LABEL_COLUMN] = pa.array(numbers.astype(np.float32))

    def _encode_split(
        self, batch: pa.RecordBatch, columns: dict[str, pa.Array], refused: list[tuple[str, Mask]]
    ) -> None:
        split = self._spec.effective_split
        if isinstance(split, ColumnSplit):
            text = text_of(batch.column(split.column), split.column, "split.column")
            test = _mask(pc.equal(text, split.test).fill_null(False))
            train = _mask(pc.equal(text, split.train).fill_null(False))
            refused.append(("unknown_split", ~(test | train)))
            columns[TEST_COLUMN] = pa.array(test)


def text_of(values: pa.Array, column: str, field: str) -> pa.Array:
    """The text form of a column.

    Raises:
        InputError: a value has none; the message names the column and the field of the spec.
    """
    try:
        return canonical_text(values)
    except ValueError as error:
        raise InputError(f"column {column!r} ({field}): {error}") from None


def _coded(batch: pa.RecordBatch, column: str, field: str) -> pa.DictionaryArray:
    """A column as some values and which of them each row has: so a value is put into text once, not in every row."""
    values = batch.column(column)
    if pa.types.is_dictionary(values.type):
        return _used(values) if len(values.dictionary) > len(values) else values
    if pa.types.is_integer(values.type) or pa.types.is_string(values.type):
        return values.dictionary_encode()
    return text_of(values, column, field).dictionary_encode()


def _used(values: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same values without those of the dictionary that no row has."""
    indices = values.indices.drop_null().to_numpy()
    used = np.zeros(len(values.dictionary), dtype=bool)
    used[indices] = True
    place = pa.array(np.cumsum(used, dtype=np.int32) - 1)
    return pa.DictionaryArray.from_arrays(place.take(values.indices), values.dictionary.filter(pa.array(used)))


def _numbers_of(batch: pa.RecordBatch, column: str) -> Numbers:
    try:
        return to_numbers(batch.column(column))
    except ValueError as error:
        raise InputError(f"column {column!r} (label.column): {error}") from None


def encode_features(
    spec: FeatureSpec, vocabularies: Vocabularies, table: pa.Table | pa.RecordBatch, source: Source
) -> dict[str, pa.Array]:
    """The features of one source as columns `feature:<name>`: int32 codes, lists of int32 codes, float32.

    Raises:
        InputError: a column of the wrong kind.
    """
    columns: dict[str, pa.Array] = {}
    for feature in spec.features:
        if feature.source != source:
            continue
        raw = table.column(feature.column_name)
        raw = raw.combine_chunks() if isinstance(raw, pa.ChunkedArray) else raw
        try:
            if isinstance(feature, DenseFeature):
                refuse_text(raw)
                column = pa.array(scale_dense(feature, raw))
            elif isinstance(feature, ListFeature):
                lists = encode_list(feature, vocabularies[feature.table_name], raw)
                column = pa.ListArray.from_arrays(
                    pa.array(lists.offsets().astype(np.int32)), pa.array(lists.values.astype(np.int32))
                )
            else:
                column = pa.array(vocabularies[feature.table_name].encode_column(raw))
        except ValueError as error:
            raise InputError(f"feature {feature.name!r} (column {feature.column_name!r}): {error}") from None
        columns[FEATURE_PREFIX + feature.name] = column
    return columns


def with_label(rows: pa.RecordBatch | pa.Table, spec: FeatureSpec) -> pa.RecordBatch | pa.Table:
    """The rows with the label that an implicit one is; it is left out where rows are moved."""
    if not isinstance(spec.label, ImplicitLabel):
        return rows
    place = sum(name in _BEFORE_LABEL for name in rows.schema.names)
    return rows.add_column(place, LABEL_COLUMN, pa.array(np.ones(rows.num_rows, dtype=np.float32)))


def hash_rows(rows: pa.RecordBatch, spec: FeatureSpec | None = None) -> Words:
    """The content hash of encoded rows, over every column but the user: one user's rows are ordered by it.

    Args:
        rows: the columns that count, and of users.
        spec: of interactions, whose label may be left out of the rows.
    """
    if spec is not None:
        rows = with_label(rows, spec)
    hashes = np.zeros(rows.num_rows, dtype=np.uint64)
    for name in rows.schema.names:
        if name in (USER_COLUMN, USER_HASH_COLUMN, NO_COLUMN):
            continue
        column = rows.column(name)
        if is_list_type(column.type):
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
            chain(hashes, hash_lists(as_words(pc.list_flatten(column).to_numpy(zero_copy_only=False)), lengths))
        else:
            # A time without a part is the time that a column without parts has.
            chain(hashes, column.to_numpy(zero_copy_only=False), without_zeros=name == TIME_PART_COLUMN)
    return hashes


def _batch(columns: dict[str, pa.Array], num_rows: int) -> pa.RecordBatch:
    """Columns as a batch; one without columns still has rows."""
    if columns:
        return pa.record_batch(columns)
    return pa.record_batch({NO_COLUMN: pa.nulls(num_rows)})


def _accepted(refused: list[tuple[str, Mask]], size: int) -> tuple[Mask, Counter[str]]:
    accepted = np.ones(size, dtype=bool)
    rejected: Counter[str] = Counter()
    for reason, mask in refused:
        count = int((accepted & mask).sum())
        if count:
            rejected[reason] += count
            accepted &= ~mask
    return accepted, rejected


def _missing(array: pa.Array) -> Mask:
    return _mask(array.is_null()) if array.null_count else np.zeros(len(array), dtype=bool)


def _mask(array: pa.Array) -> Mask:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)


def _wanted_columns(spec: FeatureSpec) -> Iterator[tuple[str, str]]:
    """(column of the interactions, field of the spec that names it)."""
    if spec.user is not None:
        yield spec.user.column, "user.column"
    if spec.item is not None:
        yield spec.item.column, "item.column"
    if spec.timestamp is not None:
        yield spec.timestamp, "timestamp"
    if isinstance(spec.label, (ColumnLabel, ThresholdLabel)):
        yield spec.label.column, "label.column"
    if isinstance(spec.effective_split, ColumnSplit):
        yield spec.effective_split.column, "split.column"
    for feature in spec.features:
        if feature.source == "context":
            yield feature.column_name, f"feature {feature.name!r}"


def _check_types(spec: FeatureSpec, source: RowSource, wanted: list[tuple[str, str]]) -> None:
    lists = {f"feature {f.name!r}" for f in spec.features if isinstance(f, ListFeature)}
    for name, field in wanted:
        for kind, where in source.types(name).items():
            if field in lists:
                expected, fits = (
                    "lists, or text with a separator in the spec",
                    is_list_type(kind) or is_scalar_type(kind),
                )
            elif field == "timestamp":
                expected, fits = "integers, floats, dates or timestamps", kind_of(kind) is not None
            else:
                expected, fits = "single values", is_scalar_type(kind)
            if not fits:
                raise InputError(f"{where}: column {name!r} ({field}) holds {kind}; expected {expected}")


def _time_kind(column: str, source: RowSource) -> Kind:
    """What the column counts, which all files have to agree in.

    Raises:
        InputError: some hold numbers and others dates, or text that is neither.
    """
    found: dict[Kind, str] = {}
    for file in source.files:
        if column not in file.schema.names:
            continue
        kind = kind_of(file.schema.field(column).type)
        if kind == "text":
            value = _first_value(file, column)
            kind = (
                "none" if value is None else kind_of_text(value, where=f"{file.where}: column {column!r} (timestamp)")
            )
        if kind in ("number", "instant"):
            found.setdefault(kind, file.where)
    if len(found) > 1:
        raise InputError(
            f"column {column!r} (timestamp) holds numbers in {found['number']} and dates in {found['instant']}: "
            "their order cannot be told"
        )
    return next(iter(found), "number")


def _first_value(file: Reader, column: str) -> str | None:
    for batch in file.batches([column]):
        text = canonical_text(batch.column(column)).drop_null()
        if len(text):
            value: str = text[0].as_py()
            return value
    return None
