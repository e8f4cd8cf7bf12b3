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
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

from lazydp.components.shared.cache_folder import cache_folder
from lazydp.components.shared.files import PRIVATE_DIRECTORY, PRIVATE_FILE, write_bytes

FORMAT_VERSION = 3

Leaves = tuple[tuple[str, int], ...]

_MEMORY_BYTES = 256 << 20
_FOLDER_BYTES = 2 << 30

# Work that would be done again without a file is worth one.
_DURABLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Kept:
    """A composition, and the seconds of work since the last one on its way that has a file."""

    distribution: Any
    unsaved: float
    _epsilons: dict[float, float] = field(default_factory=dict, repr=False, compare=False)

    def epsilon(self, delta: float) -> float:
        """Of the composition; computed once for each delta, for a ledger asks for the same again and again."""
        if delta not in self._epsilons:
            self._epsilons[delta] = float(self.distribution.get_epsilon_for_delta(delta))
        return self._epsilons[delta]


class LossStore:
    """Loss distributions by what they compose, in whatever order.

    Args:
        folder: where to keep them beyond this process; None for nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0
        self._written = _FOLDER_BYTES  # look at the folder before the first file

    def find(self, leaves: Leaves, interval: float) -> tuple[Leaves, Kept | None]:
        """A kept composition of as much of `leaves` (a run's canonical JSON, how often) as can be told quickly.

        Looked for are all of them, all but one run, and their beginnings, the longest first.

        Returns:
            what is lacking, and the composition; `leaves` and None where nothing is kept.
        """
        digests = [_digest(key) for key, _ in leaves]
        whole = _start(interval) + sum(count * digest for (_, count), digest in zip(leaves, digests, strict=True))
        candidates: list[tuple[int, Leaves]] = [(whole, ())]
        candidates += [(whole - digests[place], ((leaves[place][0], 1),)) for place in reversed(range(len(leaves)))]
        beginning = whole
        for place in range(len(leaves) - 1, 0, -1):
            beginning -= leaves[place][1] * digests[place]
            candidates.append((beginning, leaves[place:]))
        for digest, lacking in candidates:
            found = self._get(_name(digest))
            if found is not None:
                return lacking, found
        return leaves, None

    def put(self, leaves: Leaves, interval: float, kept: Kept, *, lacking: Leaves = ()) -> Kept:
        """Keep the composition of `leaves` without those `lacking`, in a file once enough work hangs on it.

        Compositions grow by short steps: what counts is the work since the last one that has a file.
        """
        name = _name(
            _start(interval)
            + sum(count * _digest(key) for key, count in leaves)
            - sum(count * _digest(key) for key, count in lacking)
        )
        if kept.unsaved > _DURABLE_SECONDS and self._folder is not None:
            # A full disk or a read-only home costs time, not correctness.
            with contextlib.suppress(OSError):
                self._write(self._folder, name, _encoded(kept.distribution))
                kept = Kept(kept.distribution, 0.0)
        self._remember(name, kept)
        return kept

    def _get(self, name: str) -> Kept | None:
        if name in self._memory:
            self._memory.move_to_end(name)
            return self._memory[name]
        found = None if self._folder is None else _read(self._folder / name)
        if found is None:
            return None
        self._remember(name, Kept(found, 0.0))
        return self._memory[name]

    def _write(self, folder: Path, name: str, data: bytes) -> None:
        folder.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        self._written += len(data)
        if self._written > _FOLDER_BYTES // 16:
            _make_room(folder)
            self._written = 0
        write_bytes(folder / name, data, mode=PRIVATE_FILE)

    def _remember(self, name: str, kept: Kept) -> None:
        if name in self._memory:
            self._bytes -= _size(self._memory.pop(name).distribution)
        self._memory[name] = kept
        self._bytes += _size(kept.distribution)
        while self._bytes > _MEMORY_BYTES and len(self._memory) > 1:
            self._bytes -= _size(self._memory.popitem(last=False)[1].distribution)


@functools.cache
def default_store() -> LossStore:
    """The store of this machine."""
    folder = cache_folder()
    return LossStore(None if folder is None else folder / "losses")


@functools.cache
def fresh_store() -> LossStore:
    """A store of what this process computed itself, and nothing else."""
    return LossStore(None)


# The name of a composition is a sum of digests, one for each run: the same in any order, and without a run by a
# subtraction.
_DIGESTS = 1 << 256


@functools.lru_cache(maxsize=1 << 14)
def _digest(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest())


def _start(interval: float) -> int:
    return _digest(json.dumps([FORMAT_VERSION, _accounting_version(), interval]))


def _name(digest: int) -> str:
    return f"{digest % _DIGESTS:064x}.npz"


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
