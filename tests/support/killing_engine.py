"""An engine whose tasks are killed: each function of a job the first time, or every time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from lazydp.components.ingest.job import Engine, Job, Keyed


@dataclass(frozen=True)
class Killed:
    """Kills its process: the first `times` that it is asked, counted by files in a folder."""

    folder: Path
    times: int

    def __call__(self, name: str) -> None:
        """Die, or go on."""
        for number in range(self.times):
            try:
                (self.folder / f"{name}{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class _Encode:
    job: Job
    killed: Killed

    def __call__(self, piece: bytes) -> Iterator[Keyed]:
        for number, one in enumerate(self.job.encode(piece)):
            if number == 1:
                self.killed("encode")
            yield one


@dataclass(frozen=True)
class _Assemble:
    job: Job
    killed: Killed

    def __call__(self, key: int, payloads: Sequence[pa.Buffer]) -> bytes:
        made = self.job.assemble(key, payloads)
        # The files of the part are in their place, and nobody is told.
        self.killed("assemble")
        return made


@dataclass(frozen=True)
class KillingEngine:
    """An engine, and how often a worker of it dies in each function.

    What the workers unpickle of this module they have to find: a test adds the folder `tests` to PYTHONPATH.
    """

    inner: Engine
    folder: Path
    encode: int = 0
    assemble: int = 0

    @property
    def name(self) -> str:
        """That of the engine."""
        return self.inner.name

    def check(self) -> None:
        """See `job.Engine`."""
        self.inner.check()

    def run(self, job: Job) -> list[bytes]:
        """See `job.Engine`."""
        encode = _Encode(job, Killed(self.folder, self.encode))
        assemble = _Assemble(job, Killed(self.folder, self.assemble))
        return self.inner.run(replace(job, encode=encode, assemble=assemble))
