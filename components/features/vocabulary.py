"""Vocabularies at work: values to row codes, the same in ingest and in the service.

A value is first put into one text form (`values.canonical_text`): 5, 5.0 and "5" are one, null and "" are missing.
Code 0 stands for missing and unknown values, known ones have codes 1..n.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lazydp.components.features.spec import FeatureSpec
from lazydp.components.features.values import Values, as_array, canonical_text, texts_of, to_numbers
from lazydp.components.features.vocabulary_spec import (
    AnyVocabulary,
    BucketVocabulary,
    DeclaredVocabulary,
    HashedVocabulary,
    IntegerVocabulary,
    num_codes,
)
from lazydp.components.shared.bounded_parquet import read_bounded
from lazydp.components.shared.errors import FormatError, InputError, IntegrityError
from lazydp.kernels.rows import TextIndex, Texts, gather, hashed_codes

_HASH_PERSON = b"lazydp.vocab"
# The one text form of an integer: neither "+2", "007" nor "-0" is the number 2, 7 or 0 (`values`).
INTEGER_TEXT = r"^(0|-?[1-9][0-9]{0,17})$"
_VALUE = "value"

Codes = np.ndarray[tuple[int], np.dtype[np.int64]]


def _key_of(salt: str) -> bytes:
    """BLAKE2b takes keys of up to 64 bytes; a salt of 64 characters may be longer."""
    key = salt.encode()
    return key if len(key) <= 64 else hashlib.sha256(key).digest()


def hash_code(text: str, *, buckets: int, salt: str) -> int:
    """Code 1..buckets of a value: BLAKE2b (RFC 7693) of its UTF-8, 64-bit, keyed with the salt, little-endian, mod."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=_key_of(salt), person=_HASH_PERSON).digest()
    return 1 + int.from_bytes(digest, "little") % buckets


class Vocabulary(ABC):
    """Values to codes. `size` counts codes of known values; codes run 0..size."""

    size: int

    @abstractmethod
    def encode(self, values: Values) -> Codes:
        """Codes [n] of the values [n]; 0 where missing or unknown.

        Raises:
            ValueError: nested values.
        """

    def encode_column(self, values: Values) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The same codes as int32; each value of a dictionary is encoded once, not in every row.

        Raises:
            ValueError: nested values.
        """
        if not isinstance(values, pa.DictionaryArray):
            return self.encode(values).astype(np.int32)
        known = np.append(self.encode(values.dictionary), 0).astype(np.int32)
        # Null indices point at the last entry, which is 0: unknown.
        places = values.indices.fill_null(len(known) - 1) if values.indices.null_count else values.indices
        codes = np.empty(len(values), dtype=np.int32)
        gather(known, places.to_numpy(zero_copy_only=False).astype(np.uint32, copy=False), codes)
        return codes

    def values(self) -> pa.Array | None:
        """The known values in code order (code 1 first), or None where they cannot be listed."""
        return None


class _TextVocabulary(Vocabulary):
    """Encodes texts."""

    @abstractmethod
    def _encode_texts(self, texts: Texts) -> Codes:
        """Codes of texts; what stands for a missing one does not count."""

    def encode(self, values: Values) -> Codes:
        text = canonical_text(values)
        codes = self._encode_texts(texts_of(text))
        if text.null_count:
            codes[np.asarray(text.is_null().to_numpy(zero_copy_only=False))] = 0
        return codes


class Hashed(_TextVocabulary):
    """See `HashedVocabulary`."""

    def __init__(self, spec: HashedVocabulary) -> None:
        self.size = spec.buckets
        self._key = _key_of(spec.salt)

    def _encode_texts(self, texts: Texts) -> Codes:
        return hashed_codes(texts, key=self._key, person=_HASH_PERSON, buckets=self.size)


class Declared(_TextVocabulary):
    """See `DeclaredVocabulary`; `values` is the public list, text [n]."""

    def __init__(self, values: pa.Array) -> None:
        self._values = values
        self.size = len(values)
        self._index: TextIndex | None = None

    def _encode_texts(self, texts: Texts) -> Codes:
        if self._index is None:
            self._index = TextIndex(texts_of(self._values))
        return self._index.find(texts)

    def values(self) -> pa.Array:
        return self._values


class Integers(Vocabulary):
    """See `IntegerVocabulary`."""

    def __init__(self, spec: IntegerVocabulary) -> None:
        self.size = spec.size
        self._first = spec.first

    def encode(self, values: Values) -> Codes:
        array = as_array(values)
        if not pa.types.is_integer(array.type) or pa.types.is_uint64(array.type):
            text = canonical_text(array)
            array = pc.if_else(pc.match_substring_regex(text, INTEGER_TEXT), text, pa.scalar(None, pa.string()))
        # One below `first` has code 0: unknown.
        whole = array.cast(pa.int64())
        known = whole.fill_null(self._first - 1) if whole.null_count else whole
        numbers = known.to_numpy(zero_copy_only=False)
        codes: Codes = numbers - (self._first - 1)
        # One comparison for both ends: what lies before the first is a large number without a sign.
        codes[codes.view(np.uint64) > self.size] = 0
        return codes

    def values(self) -> pa.Array:
        return pa.array(np.arange(self._first, self._first + self.size)).cast(pa.string())


class Buckets(Vocabulary):
    """See `BucketVocabulary`."""

    def __init__(self, spec: BucketVocabulary) -> None:
        self.size = num_codes(spec)
        self._boundaries = np.asarray(spec.boundaries, dtype=np.float64)

    def encode(self, values: Values) -> Codes:
        numbers = to_numbers(values)
        codes = np.searchsorted(self._boundaries, numbers, side="right") + 1
        return np.where(np.isnan(numbers), 0, codes).astype(np.int64)


def values_digest(values: pa.Array) -> str:
    """Hexadecimal SHA-256 of a list of texts, each with its length before it."""
    digest = hashlib.sha256()
    for value in values.to_pylist():
        encoded = value.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def check_values(values: pa.Array, *, where: str) -> pa.Array:
    """The values as the list of a declared vocabulary: text, none missing, none twice.

    Raises:
        InputError: missing or repeated values, or none at all; the message names `where`.
    """
    try:
        text = canonical_text(values)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if len(text) == 0:
        raise InputError(f"{where}: a declared vocabulary needs at least one value, found none")
    if text.null_count:
        row = pc.index(pc.is_null(text), True).as_py() + 1
        raise InputError(f"{where}: value {row} is missing; a declared vocabulary lists its values without gaps")
    counts = pc.value_counts(text)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise InputError(
            f"{where}: {repeated[0]['values'].as_py()!r} stands there {repeated[0]['counts'].as_py()} times"
        )
    return text


def make_vocabulary(spec: AnyVocabulary, values: pa.Array | None = None) -> Vocabulary:
    """The vocabulary that a spec describes; `values` is the list where it stands outside the spec.

    Raises:
        InputError: a list is needed and missing.
    """
    match spec:
        case HashedVocabulary():
            return Hashed(spec)
        case IntegerVocabulary():
            return Integers(spec)
        case BucketVocabulary():
            return Buckets(spec)
        case DeclaredVocabulary():
            if spec.values is not None:
                return Declared(pa.array(spec.values, pa.string()))
            if values is None:
                raise InputError(f"the vocabulary declared by {spec.file or spec.table} has not been read")
            return Declared(values)


class Vocabularies(Mapping[str, Vocabulary]):
    """The vocabularies of a spec by table name."""

    def __init__(self, spec: FeatureSpec, lists: Mapping[str, pa.Array]) -> None:
        """Make the vocabularies of `spec`; `lists` holds the values that stand outside it, by table name."""
        self._specs = spec.vocabularies()
        self._made = {table: make_vocabulary(part, lists.get(table)) for table, part in self._specs.items()}

    def __getitem__(self, table: str) -> Vocabulary:
        return self._made[table]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def save(self, folder: Path) -> None:
        """Write every declared list into `folder` (made where missing) as `<table>.parquet`, value i for code i + 1."""
        folder.mkdir(exist_ok=True)
        for table, part in self._specs.items():
            if isinstance(part, DeclaredVocabulary):
                pq.write_table(pa.table({_VALUE: self._made[table].values()}), folder / f"{table}.parquet")

    @classmethod
    def load(cls, spec: FeatureSpec, folder: Path) -> Vocabularies:
        """Read back what `save` wrote for this spec.

        Raises:
            FormatError: a list is missing or unreadable.
            IntegrityError: a list differs from the digest in the spec.
        """
        lists = {}
        for table, part in spec.vocabularies().items():
            if isinstance(part, DeclaredVocabulary) and part.values is None:
                lists[table] = _read_list(folder / f"{table}.parquet", size=part.size or 0)
                if values_digest(lists[table]) != part.sha256:
                    raise IntegrityError(
                        f"{folder / table}.parquet differs from the list that the feature spec vouches for"
                    )
        return cls(spec, lists)


def _read_list(path: Path, *, size: int) -> pa.Array:
    if not path.is_file():
        raise FormatError(f"the vocabulary {path} cannot be read: there is no such file")
    table = read_bounded(path, num_rows=size, columns=[_VALUE])
    if table.column_names != [_VALUE] or table.schema.field(_VALUE).type != pa.string():
        raise FormatError(f"the vocabulary {path}: expected one column {_VALUE!r} of text")
    values = table.column(_VALUE).combine_chunks()
    if values.null_count:
        raise FormatError(f"the vocabulary {path} has a value that is missing")
    return values
