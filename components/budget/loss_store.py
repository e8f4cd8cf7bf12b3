"""Composed privacy losses, kept: in memory, and in a folder of this machine for the next process.

A dataset with a thousand releases composes a thousand loss distributions; a run that comes next composes one more. The
folder (`LAZYDP_CACHE`, else `~/.cache/lazydp`) only saves time: it may be deleted, and `lazydp budget verify` never
reads it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from lazydp.components.shared.files import PRIVATE_DIRECTORY, PRIVATE_FILE, write_bytes

CACHE_VARIABLE = "LAZYDP_CACHE"
FORMAT_VERSION = 2

Leaves = tuple[tuple[str, int], ...]

_MEMORY_BYTES = 256 << 20
_FOLDER_BYTES = 2 << 30

# Work that would be done again without a file is worth one.
_DURABLE_SECONDS = 0.05


class LossStore:
    """Loss distributions by what they compose.

    Args:
        folder: where to keep them beyond this process; None for nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0
        self._written = _FOLDER_BYTES  # look at the folder before the first file

    def longest(self, leaves: Leaves, interval: float) -> tuple[int, Any | None]:
        """The longest beginning of `leaves` (an event's canonical JSON, how often) whose composition is kept.

        Returns:
            its length and the composition; 0 and None where none is.
        """
        keys = _keys(leaves, interval)
        for length in range(len(keys), 0, -1):
            found = self._get(keys[length - 1])
            if found is not None:
                return length, found
        return 0, None

    def put(self, leaves: Leaves, interval: float, distribution: Any, *, seconds: float) -> None:
        """Keep a composition that took `seconds`, in a file once enough work hangs on it.

        Compositions grow by short steps: what counts is the work since the last one that has a file.
        """
        keys = _keys(leaves, interval)
        before = next((self._memory[key] for key in reversed(keys[:-1]) if key in self._memory), None)
        unsaved = seconds + (before.unsaved if before is not None else 0.0)
        if unsaved > _DURABLE_SECONDS and self._folder is not None:
            # A full disk or a read-only home costs time, not correctness.
            with contextlib.suppress(OSError):
                self._write(self._folder, keys[-1], _encoded(distribution))
                unsaved = 0.0
        self._remember(keys[-1], _Kept(distribution, unsaved))

    def _get(self, key: str) -> Any | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key].distribution
        found = None if self._folder is None else _read(self._folder / key)
        if found is not None:
            self._remember(key, _Kept(found, 0.0))
        return found

    def _write(self, folder: Path, key: str, data: bytes) -> None:
        folder.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        self._written += len(data)
        if self._written > _FOLDER_BYTES // 16:
            _make_room(folder)
            self._written = 0
        write_bytes(folder / key, data, mode=PRIVATE_FILE)

    def _remember(self, key: str, kept: _Kept) -> None:
        if key in self._memory:
            self._bytes -= _size(self._memory.pop(key).distribution)
        self._memory[key] = kept
        self._bytes += _size(kept.distribution)
        while self._bytes > _MEMORY_BYTES and len(self._memory) > 1:
            self._bytes -= _size(self._memory.popitem(last=False)[1].distribution)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A composition, and the seconds of work since the last one before it that has a file."""

    distribution: Any
    unsaved: float


@functools.cache
def default_store() -> LossStore:
    """The store of this machine."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return LossStore(Path(named) / "losses")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # no home
        return LossStore(None)
    return LossStore(root / "lazydp" / "losses")


@functools.cache
def fresh_store() -> LossStore:
    """A store of what this process computed itself, and nothing else."""
    return LossStore(None)


def _keys(leaves: Leaves, interval: float) -> list[str]:
    """The file name of each beginning of `leaves`, shortest first: a chain of digests, so that all cost one pass."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, _accounting_version(), interval]).encode()).digest()
    keys = []
    for key, count in leaves:
        digest = hashlib.sha256(digest + f"{count} {key}".encode()).digest()
        keys.append(digest.hex() + ".npz")
    return keys


@functools.cache
def _accounting_version() -> str:
    return importlib.metadata.version("dp-accounting")


def _sides(distribution: Any) -> list[Any]:
    sides = [distribution._pmf_remove]
    if not distribution._symmetric:
        sides.append(distribution._pmf_add)
    return [side.to_dense_pmf() for side in sides]


def _size(distribution: Any) -> int:
    return 8 * int(distribution._pmf_remove.size + distribution._pmf_add.size)


def _encoded(distribution: Any) -> bytes:
    arrays: dict[str, Any] = {}
    for place, side in enumerate(_sides(distribution)):
        arrays[f"probs{place}"] = side._probs
        arrays[f"figures{place}"] = np.array([side._discretization, side._lower_loss, side._infinity_mass])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _read(file: Path) -> Any | None:
    """The distribution in `file`; None where there is none, or it is torn (the archive carries checksums)."""
    try:
        # Opened here, for numpy leaves the file of a torn archive open.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            sides = []
            for place in range(2):
                if f"probs{place}" in arrays:
                    interval, lower, infinity = arrays[f"figures{place}"].tolist()
                    sides.append(pld_pmf.DensePLDPmf(interval, int(lower), arrays[f"probs{place}"], infinity, True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return PrivacyLossDistribution(*sides) if sides else None


def _make_room(folder: Path) -> None:
    files = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*.npz"))
    total = sum(size for _, size, _ in files)
    for _, size, file in files:
        if total <= _FOLDER_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= size
