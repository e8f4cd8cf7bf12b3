"""Tensors of the Open Inference Protocol, and their bytes in its binary extension."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

Datatype: TypeAlias = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]
Value: TypeAlias = str | int | float | bool
DATATYPES: tuple[Datatype, ...] = get_args(Datatype)
INTEGERS = frozenset(name for name in DATATYPES if "INT" in name)
FLOATS = frozenset(name for name in DATATYPES if name.startswith("FP"))
# Little-endian, as the extension has them.
_NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    **{f"{kind}{8 * size}": np.dtype(f"<{kind[0].lower()}{size}") for kind in ("INT", "UINT") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output.

    Attributes:
        name: as the caller has it.
        datatype: of the protocol.
        shape: extents.
        values: flat, row by row; text for BYTES.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    values: Sequence[Value]


def flatten(data: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """JSON data of a tensor, flat or nested as its shape says, as one list.

    Raises:
        ValueError: it does not fit the shape.
    """
    if not data or not isinstance(data[0], list):
        if len(data) != math.prod(shape):
            raise ValueError(f"expected {math.prod(shape)} values, found {len(data)}")
        if any(isinstance(value, list | dict) for value in data):
            raise ValueError("expected plain values, found a list or an object among them")
        return list(data)
    if len(shape) < 2 or len(data) != shape[0] or not all(isinstance(part, list) for part in data):
        raise ValueError(f"expected lists nested as the shape {list(shape)} says")
    return list(itertools.chain.from_iterable(flatten(part, shape[1:]) for part in data))


def from_raw(raw: bytes, datatype: Datatype, shape: Sequence[int]) -> list[Value]:
    """Values of a tensor's bytes.

    Raises:
        ValueError: they do not fit datatype and shape.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return list(_texts(raw, count))
    dtype = _NUMPY[datatype]
    if len(raw) != count * dtype.itemsize:
        raise ValueError(f"expected {count * dtype.itemsize} bytes of {count} {datatype} values, found {len(raw)}")
    values: list[Value] = np.frombuffer(raw, dtype).tolist()
    return values


def _texts(raw: bytes, count: int) -> list[str]:
    if len(raw) < _LENGTH.size * count:
        raise ValueError(f"expected {count} texts with a length of 4 bytes each, found {len(raw)} bytes in all")
    texts: list[str] = []
    at = 0
    for _ in range(count):
        end = at + _LENGTH.size
        if end > len(raw):
            raise ValueError(f"expected {count} texts, found {len(texts)}")
        start, end = end, end + _LENGTH.unpack_from(raw, at)[0]
        if end > len(raw):
            raise ValueError(f"text {len(texts)} is longer than the bytes that are left")
        texts.append(_text(raw[start:end]))
        at = end
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes follow the {count} texts")
    return texts


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError("expected UTF-8 text") from None


def check_values(values: Sequence[Any], datatype: Datatype) -> None:
    """Refuse values that are not of the datatype. Ids may be integers where BYTES are expected.

    Raises:
        ValueError: one is not.
    """
    kinds = set(map(type, values))
    if datatype == "BYTES":
        fitting, words = kinds <= {str, int}, "text"
    elif datatype == "BOOL":
        fitting, words = kinds <= {bool}, "true or false"
    elif datatype in INTEGERS:
        limits = np.iinfo(_NUMPY[datatype])
        fitting = kinds <= {int} and (not values or (min(values) >= limits.min and max(values) <= limits.max))
        words = f"integers from {limits.min} to {limits.max}"
    else:
        fitting = kinds <= {int, float} and all(abs(value) <= float(np.finfo(np.float64).max) for value in values)
        words = "finite numbers"
    if not fitting:
        raise ValueError(f"expected {words} for datatype {datatype}")


def to_raw(tensor: Tensor) -> bytes:
    """Bytes of a tensor."""
    if tensor.datatype != "BYTES":
        return np.asarray(tensor.values, _NUMPY[tensor.datatype]).tobytes()
    parts = [str(value).encode() for value in tensor.values]
    return b"".join(itertools.chain.from_iterable((_LENGTH.pack(len(part)), part) for part in parts))
