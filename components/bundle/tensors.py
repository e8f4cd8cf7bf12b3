"""Tensors of a bundle: safetensors files, written whole and read through a memory map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lazydp.components.shared.errors import FormatError, UnavailableError

_DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float32, float64 or int64 tensors under their names."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r}: a bundle holds {sorted(_DTYPES)}, found {tensor.dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # what it makes of a full disk
        raise UnavailableError(f"{path} cannot be written: {' '.join(str(error).split())}") from error


def read(path: Path, expected: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]) -> dict[str, Tensor]:
    """Map the tensors of `path` into memory; pages load when they are read.

    Args:
        path: the safetensors file.
        expected: name -> (dtype, shape); None leaves an extent open. Names must agree exactly.

    Raises:
        FormatError: not a safetensors file, or a name, dtype or shape that differs; checked on the header alone.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if found != set(expected):
                odd = sorted(found ^ set(expected))[0]
                raise FormatError(f"{path}: tensor {odd!r} is {'not expected' if odd in found else 'missing'}")
            for name, (dtype, shape) in expected.items():
                part = file.get_slice(name)
                complaint = _difference(part.get_dtype(), tuple(part.get_shape()), dtype, shape)
                if complaint:
                    raise FormatError(f"{path}: tensor {name!r} has {complaint}")
            return {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read as safetensors: {' '.join(str(error).split())}") from error


def _difference(
    found_dtype: str, found: tuple[int, ...], dtype: torch.dtype, expected: tuple[int | None, ...]
) -> str | None:
    if found_dtype != _NAMES[dtype]:
        return f"dtype {found_dtype}, expected {_NAMES[dtype]}"
    if len(found) != len(expected) or any(e is not None and e != f for e, f in zip(expected, found, strict=True)):
        shape = "x".join("?" if extent is None else str(extent) for extent in expected)
        return f"shape {'x'.join(map(str, found))}, expected {shape}"
    return None
