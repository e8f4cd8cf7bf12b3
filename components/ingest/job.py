"""What an engine runs: pieces of a log are encoded, what comes of them is grouped by key, each group is assembled.

An engine moves bytes. What they mean is known to the two functions of the job alone (`tasks`), and so every engine
makes the same dataset.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from lazydp.components.ingest.locations import one_line
from lazydp.components.shared import errors
from lazydp.components.shared.errors import InputError, LazyDPError, UnavailableError

# An Arrow column of small binary values holds less than 2 GiB.
PAYLOADS = pa.schema([("key", pa.int32()), ("payload", pa.large_binary())])
Keyed: TypeAlias = tuple[int, pa.Buffer]
# How often a task runs at most, where workers die.
ATTEMPTS = 4
# Before the name and the message of an error, in whatever text an engine wraps it.
_MARK = "lazydp-task "
# In what engines say of a worker that ended while it worked.
_LOST = ("died", "crashed", "ExecutorLost", "OutOfMemory")
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


@dataclass(frozen=True)
class Job:
    """Work for an engine; all of it may be sent to other machines.

    pieces: arguments of `encode`, pickled.
    encode: makes (key, payload) of a piece. An engine may call it again for the same piece, and use either result.
    assemble: makes one result of a key and its payloads, in any order. It may be called again as well, also while an
        earlier call for the same key still runs.
    num_keys: keys run 0..num_keys - 1.
    """

    pieces: Sequence[bytes]
    encode: Callable[[bytes], Iterator[Keyed]]
    assemble: Callable[[int, Sequence[pa.Buffer]], bytes]
    num_keys: int


class Engine(Protocol):
    """Runs jobs on one machine or on many."""

    @property
    def name(self) -> str:
        """As `--engine` has it."""

    def check(self) -> None:
        """Check that the engine can be started, before anything is read or written.

        Raises:
            InputError: a package or a program that it needs is missing.
        """

    def run(self, job: Job) -> list[bytes]:
        """The results of `assemble` for all keys that have payloads, in any order.

        Raises:
            LazyDPError: that of a task.
            UnavailableError: the engine lost workers too often, or its cluster does not answer.
        """


def is_installed(package: str) -> bool:
    """Whether a package of an extra can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        return False


def keyed(key: int, payload: pa.Buffer) -> pa.RecordBatch:
    """A payload as a batch of the schema `PAYLOADS`; not copied."""
    ends = pa.py_buffer(np.array([0, payload.size], dtype=np.int64))
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, payload])
    return pa.RecordBatch.from_arrays([pa.array([key], pa.int32()), column], schema=PAYLOADS)


def group(found: pa.Table) -> tuple[int, list[pa.Buffer]]:
    """The key of a table of payloads, which has one, and its payloads."""
    (key,) = found.column(0).unique().to_pylist()
    return key, [value.as_buffer() for chunk in found.column(1).chunks for value in chunk]


class TaskError(Exception):
    """An error of lazydp in a task, as text that survives how engines wrap errors."""

    def __init__(self, error: LazyDPError) -> None:
        super().__init__(_MARK + json.dumps({"kind": type(error).__name__, "message": str(error)}))

    def __reduce__(self) -> tuple[type[Exception], tuple[str]]:
        """An engine may pickle the error: without this, its text would be taken for the error itself."""
        return Exception, (str(self),)


@contextmanager
def told_errors() -> Iterator[None]:
    """Raise what a user can act on as a `TaskError`: an error of lazydp, a full disk, too little memory."""
    try:
        yield
    except LazyDPError as error:
        raise TaskError(error) from None
    except OSError as error:
        text = _FULL.get(error.errno or 0, one_line(error))
        where = f" ({error.filename})" if error.filename is not None else ""
        raise TaskError(UnavailableError(f"a task on {socket.gethostname()} failed: {text}{where}")) from None
    except MemoryError:
        text = "more memory was needed than there is; use more --parts, or workers with more memory"
        raise TaskError(UnavailableError(f"a task on {socket.gethostname()} failed: {text}")) from None


def error_of_task(error: BaseException) -> LazyDPError | None:
    """The error of lazydp that a task ended with, wherever an engine put its text; None where it was another."""
    text = str(error)
    begin = text.find(_MARK)
    if begin < 0:
        return None
    found, _ = json.JSONDecoder().raw_decode(text, begin + len(_MARK))
    kind = getattr(errors, found["kind"], UnavailableError)
    made: LazyDPError = kind(found["message"])
    return made


def gave_up(engine: str, error: Exception) -> LazyDPError:
    """What to tell of an engine that ended a job for no error of a task.

    Args:
        engine: its name, for the message.
        error: what it raised.
    """
    text = str(error)
    if "No module named 'lazydp'" in text:
        return InputError(f"a worker of {engine} cannot import lazydp: install lazydp {version('lazydp')} on all nodes")
    lost = any(mark in text for mark in _LOST)
    why = "a worker died too often, perhaps for lack of memory: use more --parts, or fewer --workers; " if lost else ""
    return UnavailableError(f"{engine} gave the job up: {why}{one_line(error)}")
