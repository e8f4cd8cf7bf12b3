"""One text form for every scalar value, and one number: the same in logs, side tables, vocabularies and requests.

type                                text
text, dictionary of it              itself; "" is missing
integers of any width               decimal digits
floating point                      an integral value as an integer (5.0 is 5), others the shortest text that
                                    gives the number back as float64; NaN is missing
decimal                             as the number it is, without trailing zeros (1.50 is 1.5, 1.00 is 1)
boolean                             true, false
date                                2024-01-31
timestamp                           2024-01-31 12:00:00, with .5 or more digits where there is a fraction, and with
                                    Z after it, in UTC, where the column has a time zone
time of day                         12:00:00, with a fraction where there is one
UUID                                lower case, 8-4-4-4-12
bytes                               the text that they are in UTF-8; other bytes are refused
lists, structs, durations, intervals are refused
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lazydp.kernels.rows import Integers, Texts

# Characters of the id of a user or an item: in data, in requests and in the inference protocol alike.
MAX_ID = 256
_NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
_ZEROS_OF_FRACTION = r"\.?0+$"
# Integers up to here are exact in float64.
_EXACT = 2.0**63

Numbers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]
# A pyarrow Array or ChunkedArray (pyarrow carries no types), or a plain sequence.
Values: TypeAlias = Sequence[Any] | Any


def as_array(values: Values) -> pa.Array:
    """One array of a plain type, without dictionary, runs or views.

    Raises:
        ValueError: objects that are no values.
    """
    try:
        array = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        # Mixed kinds in one request, such as [5, "6"], or integers of more than 64 bits.
        array = pa.array([scalar_text(value) for value in values], pa.string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        return _of_extension(array)
    kind = array.type
    if pa.types.is_run_end_encoded(kind):
        return as_array(pc.run_end_decode(array))
    if pa.types.is_dictionary(kind):
        return as_array(pc.take(as_array(array.dictionary), array.indices))
    if pa.types.is_string_view(kind):
        return array.cast(pa.string())
    return array.cast(pa.binary()) if pa.types.is_binary_view(kind) else array


def scalar_text(value: object) -> str | None:
    """The text form of one Python value.

    Raises:
        ValueError: it has none.
    """
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float_to_text(value)
    if isinstance(value, (list, dict, tuple, set)):
        raise ValueError(f"expected single values, found {type(value).__name__}")  # noqa: TRY004 - as for arrays
    try:
        text: str | None = canonical_text(pa.array([value]))[0].as_py()
    except (pa.ArrowException, TypeError, OverflowError):
        raise ValueError(f"a {type(value).__name__} is no value: expected text or a number") from None
    return text


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values themselves: what a dictionary, runs or an extension type hold."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.string() if kind.extension_name == "arrow.uuid" else plain_type(kind.storage_type)
    return kind


def is_scalar_type(kind: pa.DataType) -> bool:
    """Whether a column of this type holds one value with a text form a row."""
    kind = plain_type(kind)
    return not (pa.types.is_nested(kind) or pa.types.is_duration(kind) or pa.types.is_interval(kind))


def canonical_text(values: Values) -> pa.Array:
    """The values as text [n], see the module; null where missing.

    Raises:
        ValueError: nested values, durations, or bytes that are not UTF-8.
    """
    if isinstance(values, (pa.Array, pa.ChunkedArray)) and pa.types.is_dictionary(values.type):
        array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        if isinstance(array, pa.DictionaryArray):
            return pc.take(canonical_text(array.dictionary), array.indices)
    array = as_array(values)
    kind = array.type
    if not is_scalar_type(kind):
        raise ValueError(f"expected single values, found {kind}")
    if pa.types.is_floating(kind):
        return _float_text(array)
    if pa.types.is_decimal(kind):
        return _decimal_text(array)
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        return _time_text(array)
    try:
        text = array.cast(pa.string())
    except pa.ArrowException:
        raise ValueError(
            f"{kind} cannot be read as text: a value is not UTF-8; cast the column to text, integers or UUID"
        ) from None
    return _without_empty(text)


def texts_of(text: pa.Array) -> Texts:
    """A string or binary array as the functions of `kernels.rows` take it, without a copy; a null counts as ""."""
    array = text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
    if array.null_count:
        array = array.fill_null("")
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offsets, data = array.buffers()
    if offsets is None or len(array) == 0:
        return Texts(None, np.zeros(1, dtype=np.int64))
    places = np.frombuffer(offsets, dtype=np.int64 if wide else np.int32)
    return Texts(data, places[array.offset : array.offset + len(array) + 1])


def integers_of(array: pa.Array) -> Integers:
    """An array of int32 or int64 as the functions of `kernels.rows` take it, without a copy."""
    valid, data = array.buffers()
    values = np.frombuffer(data, dtype=array.type.to_pandas_dtype())[array.offset : array.offset + len(array)]
    return Integers(values, valid if array.null_count else None, array.offset)


def to_numbers(values: Values) -> Numbers:
    """The values as float64 [n]; missing values and text that is no number are NaN.

    Raises:
        ValueError: nested values.
    """
    array = as_array(values)
    kind = array.type
    if pa.types.is_nested(kind):
        raise ValueError(f"expected numbers, found {kind}")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        text = canonical_text(array)
        text = pc.if_else(pc.equal(text, "true"), "1", pc.if_else(pc.equal(text, "false"), "0", text))
        array = pc.if_else(pc.match_substring_regex(text, _NUMBER), text, pa.scalar(None, pa.string()))
        array = pc.utf8_ltrim(array, "+")
    numbers = array.cast(pa.float64(), safe=False)
    return np.asarray(numbers.fill_null(float("nan")).to_numpy(zero_copy_only=False), dtype=np.float64)


def _of_extension(array: pa.ExtensionArray) -> pa.Array:
    storage = array.storage
    if array.type.extension_name != "arrow.uuid":
        return as_array(storage)
    texts = [None if value is None else str(uuid.UUID(bytes=value)) for value in storage.to_pylist()]
    return pa.array(texts, pa.string())


def _without_empty(text: pa.Array) -> pa.Array:
    empty = pc.equal(text, "")
    return pc.if_else(empty, pa.scalar(None, pa.string()), text) if pc.any(empty).as_py() else text


def _float_to_text(value: float) -> str | None:
    if math.isnan(value):
        return None
    if value.is_integer():
        return str(int(value))
    # As Arrow writes it: 0.00001 and 1e-7, where Python has 1e-05 and 1e-07.
    text: str = pa.scalar(value).cast(pa.string()).as_py()
    return text


def _float_text(array: pa.Array) -> pa.Array:
    numbers = array.cast(pa.float64())
    numbers = pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
    integral = pc.equal(numbers, pc.floor(numbers))
    small = pc.and_(integral, pc.less(pc.abs(numbers), _EXACT))
    integers = pc.if_else(small, numbers, pa.scalar(None, pa.float64())).cast(pa.int64())
    text = pc.if_else(small, integers.cast(pa.string()), numbers.cast(pa.string()))
    large = pc.and_(integral, pc.and_(pc.invert(small), pc.is_finite(numbers)))
    if not pc.any(large).as_py():
        return text
    digits = [None if value is None else _float_to_text(value) for value in numbers.to_pylist()]
    return pc.if_else(large, pa.array(digits, pa.string()), text)


def _decimal_text(array: pa.Array) -> pa.Array:
    text = array.cast(pa.string())
    if array.type.scale == 0:
        return text
    # Arrow writes a small fraction with an exponent (1E-10), which no trimming puts right.
    if pc.any(pc.match_substring(text, "E")).as_py():
        values = [None if value is None else _decimal_to_text(value) for value in array.to_pylist()]
        return pa.array(values, pa.string())
    fraction = pc.match_substring(text, ".")
    trimmed = pc.replace_substring_regex(text, _ZEROS_OF_FRACTION, "")
    trimmed = pc.if_else(pc.equal(trimmed, "-0"), "0", trimmed)
    text = pc.if_else(fraction, trimmed, text)
    # A small fraction is written as the float is, where that is the same number.
    small = pc.match_substring_regex(text, r"^-?0\.0000")
    if not pc.any(small).as_py():
        return text
    values = [None if value is None else _decimal_to_text(value) for value in array.to_pylist()]
    return pa.array(values, pa.string())


def _decimal_to_text(value: Decimal) -> str:
    """As the equal float is written, where there is one; else in plain digits."""
    number = float(value)
    if math.isfinite(number) and Decimal(repr(number)) == value:
        return _float_to_text(number) or ""
    plain = format(value, "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _time_text(array: pa.Array) -> pa.Array:
    kind = array.type
    zoned = pa.types.is_timestamp(kind) and kind.tz is not None
    if zoned:
        array = array.cast(pa.timestamp(kind.unit, "UTC")).cast(pa.timestamp(kind.unit))
    text = array.cast(pa.string())
    if kind.unit != "s":
        text = pc.replace_substring_regex(text, _ZEROS_OF_FRACTION, "")
        # Without a fraction the zeros of the seconds went as well: whole seconds are cast anew.
        whole = pc.invert(pc.match_substring(text, "."))
        if pc.any(whole).as_py():
            text = pc.if_else(whole, _whole_seconds(array), text)
    return pc.binary_join_element_wise(text, "Z", "") if zoned else text


def _whole_seconds(array: pa.Array) -> pa.Array:
    kind = pa.timestamp("s") if pa.types.is_timestamp(array.type) else pa.time32("s")
    return array.cast(kind, safe=False).cast(pa.string())
