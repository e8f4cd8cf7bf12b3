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
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from lazydp.components.shared.files import PRIVATE_DIRECTORY, PRIVATE_FILE, write_bytes

CACHE_VARIABLE = "LAZYDP_CACHE"
FORMAT_VERSION = 1

Leaves = tuple[tuple[str, int], ...]

_MEMORY_BYTES = 256 << 20
_FOLDER_BYTES = 2 << 30


class LossStore:
    """Loss distributions by what they compose.

    Args:
        folder: where to keep them beyond this process; None for nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0

    def get(self, leaves: Leaves, interval: float) -> Any | None:
        """The composition of `leaves` (an event's canonical JSON, how often), if it is kept."""
        key = _key(leaves, interval)
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        found = None if self._folder is None else _read(self._folder / key)
        if found is not None:
            self._remember(key, found)
        return found

    def put(self, leaves: Leaves, interval: float, distribution: Any, *, durable: bool) -> None:
        """Keep a composition; `durable` where it took long enough to be worth a file."""
        key = _key(leaves, interval)
        self._remember(key, distribution)
        if durable and self._folder is not None:
            # A full disk or a read-only home costs time, not correctness.
            with contextlib.suppress(OSError):
                self._folder.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
                _make_room(self._folder)
                write_bytes(self._folder / key, _encoded(distribution), mode=PRIVATE_FILE)

    def _remember(self, key: str, distribution: Any) -> None:
        if key in self._memory:
            self._bytes -= _size(self._memory.pop(key))
        self._memory[key] = distribution
        self._bytes += _size(distribution)
        while self._bytes > _MEMORY_BYTES and len(self._memory) > 1:
            self._bytes -= _size(self._memory.popitem(last=False)[1])


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


def _key(leaves: Leaves, interval: float) -> str:
    covered = [FORMAT_VERSION, importlib.metadata.version("dp-accounting"), interval, leaves]
    return hashlib.sha256(json.dumps(covered).encode()).hexdigest() + ".npz"


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
