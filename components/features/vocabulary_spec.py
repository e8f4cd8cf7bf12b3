"""How a feature spec declares vocabularies: which values of a column have which codes."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lazydp.components.shared.errors import InputError
from lazydp.components.shared.frozen_model import FrozenModel

# Codes are stored as int32.
_MAX_CODES = 2**31 - 2
_LARGEST_FIRST = 10**17

Column = Annotated[str, Field(min_length=1)]

Count = Annotated[int, Field(ge=1, le=_MAX_CODES, strict=True)]

Salt = Annotated[str, Field(min_length=1, max_length=64)]


def _value_text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        # ValueError, not TypeError: pydantic turns only the former into a validation error.
        raise ValueError(f"a value must be text or a number, found {value!r}: put it in quotes")  # noqa: TRY004
    # Imported here: training on a machine without pyarrow (`make gpu`) reads no dataset and declares no values.
    from lazydp.components.features.values import scalar_text  # noqa: PLC0415

    text = scalar_text(value)
    if text is None:
        raise ValueError("an empty value stands for a missing one and cannot be declared")
    return text


ValueText = Annotated[str, BeforeValidator(_value_text)]


class HashedVocabulary(FrozenModel):
    """Values fall into `buckets` codes by a hash keyed with a public salt; unbounded value sets, no list to release."""

    kind: Literal["hashed"]
    buckets: Count
    salt: Salt


class DeclaredVocabulary(FrozenModel):
    """A public list of values; value i (from 0) has code i + 1.

    The list stands in the spec (`values`), in a `file` (text with one value a line, or a `column` of a Parquet, CSV or
    TSV file), or it is the key column of the side `table` "items". There is no such choice for users: who is a user is
    private, what is on offer is not. `size` and `sha256` are filled in when the list was read from elsewhere, and
    vouch for the copy that travels in `vocab/`.
    """

    kind: Literal["declared"]
    values: tuple[ValueText, ...] | None = None
    file: str | None = None
    column: Column | None = None
    table: Literal["items"] | None = None
    size: Count | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.values, self.file, self.table)) != 1:
            raise ValueError("a declared vocabulary needs exactly one of values, file, table")
        if self.column is not None and self.file is None:
            raise ValueError("column names a column of file, and there is no file")
        if self.values is not None:
            if not self.values:
                raise ValueError("values is empty")
            seen: set[str] = set()
            for value in self.values:
                if value in seen:
                    raise ValueError(f"value {value!r} is declared twice")
                seen.add(value)
        return self


class IntegerVocabulary(FrozenModel):
    """Values that are integers `first` .. `first + size - 1` already; value v has code v - first + 1.

    Text is one of them in its one form only: "7" is 7, and "007" and "+7" are other, unknown values, as they are in the
    other vocabularies.
    """

    kind: Literal["integer"]
    size: Count
    # Every value has at most 18 digits: what text of them is sure to hold.
    first: Annotated[int, Field(strict=True, ge=-_LARGEST_FIRST, le=_LARGEST_FIRST)] = 0


class BucketVocabulary(FrozenModel):
    """A number falls between declared boundaries; n boundaries make n + 1 codes, each including its lower boundary."""

    kind: Literal["buckets"]
    boundaries: Annotated[tuple[float, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not all(math.isfinite(b) for b in self.boundaries):
            raise ValueError("boundaries must be finite")
        if any(low >= high for low, high in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError("boundaries must be strictly ascending")
        return self


AnyVocabulary = HashedVocabulary | DeclaredVocabulary | IntegerVocabulary | BucketVocabulary

VocabularySpec = Annotated[AnyVocabulary, Field(discriminator="kind")]


def num_codes(vocabulary: AnyVocabulary) -> int:
    """Codes of known values, n; codes run from 0 (unknown) to n.

    Raises:
        InputError: a declared vocabulary whose file or table has not been read yet.
    """
    match vocabulary:
        case HashedVocabulary():
            return vocabulary.buckets
        case IntegerVocabulary():
            return vocabulary.size
        case BucketVocabulary():
            return len(vocabulary.boundaries) + 1
        case DeclaredVocabulary(values=values) if values is not None:
            return len(values)
        case DeclaredVocabulary(size=size) if size is not None:
            return size
    origin = vocabulary.file or f"the {vocabulary.table} table"
    raise InputError(f"the vocabulary declared by {origin} has not been read: use the spec of an ingested dataset")
