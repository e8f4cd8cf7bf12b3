"""The rows of tables in a checkpoint that several ranks write: a file for each rank, read by any number of ranks.

    step-000000500/
      shard-00000-of-00002.safetensors    rows of every table that rank 0 owned, with `last` and velocities
      shard-00001-of-00002.safetensors
      state.safetensors, checkpoint.json, noise.key    see `checkpoint`; checkpoint.json has the digest of each shard,
                                                       and the places of the rows that it holds

Every rank writes its own file into the folder that rank 0 made. Rank 0 adds the rest once it has all digests, and gives
the folder its name: so a checkpoint is whole, and all of it is of one step. Ranks read what they own now, from any
files that hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lazydp.components.models.recommender import Recommender
from lazydp.components.shared.errors import FormatError, IntegrityError, UnavailableError
from lazydp.components.shared.files import sha256_file, sync_file
from lazydp.components.train.ranks.places import shard
from lazydp.components.train.ranks.ranks import Ranks

ROWS = "state/embeddings/tables/"
"""How the names of tensors begin that have a row for each row of a table."""

_DIGEST_BYTES = 32

WriteTensors = Callable[[Path, dict[str, Tensor]], str]
"""Writes a private file of tensors, and returns its SHA-256."""


@dataclass(frozen=True, slots=True)
class Shards:
    """Which rows of a run's tables the ranks own.

    Attributes:
        ranks: all of them.
        num_rows: of each table.
        check: refuses to keep a checkpoint once another attempt holds the run's lease; called by rank 0 only.
    """

    ranks: Ranks
    num_rows: Mapping[str, int]
    check: Callable[[], None] | None = None

    @classmethod
    def of(cls, model: Recommender, ranks: Ranks) -> Self:
        """The shards of the tables of `model`."""
        return cls(ranks, {name: shape.num_rows for name, shape in model.tables.items()})

    def places(self, rank: int | None = None) -> dict[str, range]:
        """What a rank owns of each table; None: this one."""
        own = self.ranks.rank if rank is None else rank
        return {name: shard(rows, rank=own, ranks=self.ranks.size) for name, rows in self.num_rows.items()}

    def write_first(self, parent: Path, folder: Path, rows: dict[str, Tensor], write: WriteTensors) -> dict[str, str]:
        """What rank 0 does: write its file, and wait for those of the others; returns the digest of each.

        Args:
            parent: of all checkpoints; on another rank it may have another path.
            folder: of this one, while it is written.
            rows: of this rank.
            write: writes them.

        Raises:
            UnavailableError: a rank could not write its file; the message names it.
        """
        self.ranks.tell({"folder": str(folder.relative_to(parent.absolute()))})
        digests = self._written(folder, rows, write)
        failed = [str(rank) for rank, digest in enumerate(digests) if digest is None]
        if failed:
            raise UnavailableError(
                f"rank {', '.join(failed)} of {self.ranks.size} could not write its rows to {folder.parent}: the "
                "checkpoint is not kept; the log of that rank says why"
            )
        if self.check is not None:
            self.check()
        return {self._file(rank): digest for rank, digest in enumerate(digests) if digest is not None}

    def write_with_first(self, parent: Path, rows: dict[str, Tensor], write: WriteTensors) -> None:
        """What every other rank does: write its file into the folder of rank 0, and wait until it has its name.

        See `write_first`.
        """
        self._written(parent / self.ranks.tell(None)["folder"], rows, write)
        self.ranks.tell(None)

    def kept(self, step: int) -> None:
        """Rank 0 tells the others that the checkpoint has its name."""
        self.ranks.tell({"kept": step})

    def _written(self, folder: Path, rows: dict[str, Tensor], write: WriteTensors) -> list[str | None]:
        """Write this rank's file; the digest of each rank's, None where it failed."""
        error: Exception | None = None
        digest = bytes(_DIGEST_BYTES)
        try:
            digest = bytes.fromhex(write(folder / self._file(self.ranks.rank), rows))
            sync_file(folder / self._file(self.ranks.rank))
        except (OSError, SafetensorError) as failure:
            error = failure
        own = torch.tensor([error is None, *digest], dtype=torch.uint8)
        found = [of.numpy().tobytes() for of in self.ranks.gather(own, purpose="checkpoint")]
        if error is not None and self.ranks.rank:
            raise error
        return [of[1:].hex() if of[0] else None for of in found]

    def _file(self, rank: int) -> str:
        return f"shard-{rank:05d}-of-{self.ranks.size:05d}.safetensors"

    def described(self) -> list[dict[str, Any]]:
        """What checkpoint.json says of the files."""
        return [
            {
                "file": self._file(rank),
                "places": {name: [own.start, own.stop] for name, own in self.places(rank).items()},
            }
            for rank in range(self.ranks.size)
        ]


def read_rows(
    folder: Path, described: list[dict[str, Any]], digests: Mapping[str, str], places: Mapping[str, range] | None
) -> dict[str, Tensor]:
    """The tensors of rows, from the files that hold some of them.

    Args:
        folder: of the checkpoint.
        described: what `Shards.described` gave.
        digests: SHA-256 of each file.
        places: of the rows that are wanted, by table; None: all.

    Raises:
        IntegrityError: a file is missing or altered; the message names it.
        FormatError: the files don't hold what they are said to hold.
    """
    parts: dict[str, list[Tensor]] = {}
    for of_file in described:
        file = folder / of_file["file"]
        wanted = {name: _overlap(range(*held), name, places) for name, held in of_file["places"].items()}
        if places is not None and not any(wanted.values()) and any(map(len, places.values())):
            continue
        _check(file, digests.get(of_file["file"]))
        try:
            with safe_open(file, framework="pt") as content:
                for key in content.keys():  # noqa: SIM118 - it is no mapping
                    name = key.removeprefix(ROWS).rpartition("/")[0]
                    parts.setdefault(key, []).append(content.get_slice(key)[wanted[name].start : wanted[name].stop])
        except (SafetensorError, KeyError) as error:
            raise FormatError(f"{file} cannot be read: {error}") from error
    return {key: of[0] if len(of) == 1 else torch.cat(of) for key, of in parts.items()}


def _overlap(held: range, name: str, places: Mapping[str, range] | None) -> range:
    """Which rows of a file, counted from its first, are wanted."""
    if places is None:
        return range(len(held))
    first = max(held.start, places[name].start)
    return range(first - held.start, max(first, min(held.stop, places[name].stop)) - held.start)


def _check(file: Path, digest: str | None) -> None:
    if not file.is_file():
        raise IntegrityError(f"{file} is missing: a checkpoint is read with the files of all ranks that wrote it")
    if sha256_file(file) != digest:
        raise IntegrityError(f"{file} differs from its digest")
