"""Times of interactions as numbers that can be sorted, whatever type holds them.

A time is a whole number and a part of one in [0, 1): of what the column counts for numbers, of microseconds for dates
and timestamps. So integers of 64 bits, fractions and nanoseconds all keep their order, also where files of one log hold
different types. Timestamps without a time zone are taken as UTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.components.features.values import as_array, canonical_text, plain_type
from lazydp.components.shared.errors import InputError

Kind = Literal["number", "instant"]
Array = np.ndarray[Any, Any]

# Integers that 64 bits surely hold.
_INTEGER = r"^[+-]?(\d{1,18}|[1-8]\d{18})$"
_NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
_INSTANT = r"^\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(\.\d+)?)?)?(Z|[+-]\d{2}:?\d{2})?$"
_ZONE = r"(Z|[+-]\d{2}:?\d{2})$"
_LARGEST = 2.0**63


@dataclass(frozen=True)
class Times:
    """n times: whole int64 [n], part float64 [n] or None where every part is 0, valid bool [n]."""

    whole: Array
    part: Array | None
    valid: Array


def kind_of(kind: pa.DataType) -> Kind | Literal["text", "none"] | None:
    """What a column of this type counts; "text" has to be looked at, None is no time."""
    kind = plain_type(kind)
    if pa.types.is_null(kind):
        return "none"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return "instant"
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return "text" if text else None


def kind_of_text(value: str, *, where: str) -> Kind:
    """What a column of text counts, by one value of it.

    Raises:
        InputError: it is neither a number nor a date.
    """
    one = pa.array([value])
    if pc.match_substring_regex(one, _NUMBER)[0].as_py():
        return "number"
    if pc.match_substring_regex(one, _INSTANT)[0].as_py():
        return "instant"
    raise InputError(
        f"{where}: expected times as numbers or as 2024-01-31 12:00:00, with Z or +01:00 after it or not, "
        "found other text"
    )


def has_parts(kind: pa.DataType) -> bool:
    """Whether times of this type may have a part besides the whole."""
    kind = plain_type(kind)
    exact = pa.types.is_integer(kind) or pa.types.is_date(kind) or pa.types.is_null(kind)
    return not exact and not (pa.types.is_timestamp(kind) and kind.unit != "ns")


def encode_times(values: Any, kind: Kind) -> Times:
    """The times of a column; one that is missing, not finite or not of `kind` is not valid."""
    array = as_array(values)
    if pa.types.is_null(array.type):
        return Times(np.zeros(len(array), np.int64), None, np.zeros(len(array), bool))
    if pa.types.is_integer(array.type):
        return _of_integers(array)
    if pa.types.is_floating(array.type):
        return _of_floats(_numpy(array.cast(pa.float64()), np.nan))
    if pa.types.is_date(array.type) or pa.types.is_timestamp(array.type):
        return _of_instants(array)
    text = canonical_text(array)
    return _of_number_text(text) if kind == "number" else _of_instants(_parsed(text))


def _numpy(array: pa.Array, missing: Any) -> Array:
    known = array.fill_null(missing) if array.null_count else array
    return np.asarray(known.to_numpy(zero_copy_only=False))


def _valid(array: pa.Array) -> Array:
    if not array.null_count:
        return np.ones(len(array), dtype=bool)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=bool)


def _of_integers(array: pa.Array) -> Times:
    valid = _valid(array)
    if pa.types.is_uint64(array.type):
        numbers = _numpy(array, 0)
        valid &= numbers <= np.uint64(2**63 - 1)
        return Times(np.where(valid, numbers, 0).astype(np.int64), None, valid)
    return Times(_numpy(array.cast(pa.int64()), 0), None, valid)


def _of_floats(numbers: Array) -> Times:
    with np.errstate(invalid="ignore"):
        valid = np.isfinite(numbers) & (np.abs(numbers) < _LARGEST)
    numbers = np.where(valid, numbers, 0.0)
    whole = np.floor(numbers)
    return Times(whole.astype(np.int64), numbers - whole, valid)


def _of_instants(array: pa.Array) -> Times:
    valid = _valid(array)
    kind = array.type
    if pa.types.is_date32(kind):
        return Times(_numpy(array.cast(pa.int32()), 0).astype(np.int64) * 86_400_000_000, None, valid)
    unit = "ms" if pa.types.is_date64(kind) else kind.unit
    ticks = _numpy(array.cast(pa.int64()), 0)
    if unit == "ns":
        whole = ticks // 1000
        return Times(whole, (ticks - whole * 1000) / 1000.0, valid)
    factor = {"s": 1_000_000, "ms": 1000, "us": 1}[unit]
    valid &= np.abs(ticks) <= (2**63 - 1) // factor
    return Times(np.where(valid, ticks, 0) * factor, None, valid)


def _of_number_text(text: pa.Array) -> Times:
    integral = pc.match_substring_regex(text, _INTEGER)
    if pc.all(integral.fill_null(True)).as_py():
        return _of_integers(pc.utf8_ltrim(text, "+").cast(pa.int64()))
    numeric = pc.match_substring_regex(text, _NUMBER)
    plain = pc.utf8_ltrim(pc.if_else(numeric, text, pa.scalar(None, pa.string())), "+")
    found = _of_floats(_numpy(plain.cast(pa.float64()), np.nan))
    # What is written as an integer is kept to its last digit.
    exact = _of_integers(pc.utf8_ltrim(pc.if_else(integral, text, pa.scalar(None, pa.string())), "+").cast(pa.int64()))
    assert found.part is not None
    return Times(np.where(exact.valid, exact.whole, found.whole), np.where(exact.valid, 0.0, found.part), found.valid)


def _parsed(text: pa.Array) -> pa.Array:
    """Text as timestamps in microseconds, null where it is none."""
    text = pc.if_else(pc.match_substring_regex(text, _INSTANT), text, pa.scalar(None, pa.string()))
    text = pc.replace_substring_regex(text, r"(\.\d{6})\d+", r"\1")
    zoned = pc.match_substring_regex(text, _ZONE)
    bare = pc.if_else(zoned, pa.scalar(None, pa.string()), text)
    within = pc.if_else(zoned, text, pa.scalar(None, pa.string()))
    return pc.coalesce(_cast(bare, None), _cast(within, "UTC").cast(pa.timestamp("us")))


def _cast(text: pa.Array, zone: str | None) -> pa.Array:
    kind = pa.timestamp("us", zone)
    try:
        return text.cast(kind)
    except pa.ArrowInvalid:
        # Some date has the form and is none, such as 2024-02-30.
        return pa.array([_one(value, kind) for value in text], kind)


def _one(value: Any, kind: pa.DataType) -> Any:
    try:
        return value.cast(kind).as_py()
    except pa.ArrowInvalid:
        return None
