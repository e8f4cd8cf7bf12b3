"""Jobs of ingest on Ray Data: on a Ray of this process' own, or on a cluster that runs already.

Ray keeps what tasks return in shared memory, and writes it to files where that is full. Tasks whose worker died run
again, and so do those whose results died with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lazydp.components.ingest.job import ATTEMPTS, PAYLOADS, Job, error_of_task, gave_up, group, is_installed, keyed
from lazydp.components.ingest.locations import one_line
from lazydp.components.ingest.surroundings import environment, same_signals
from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.components.shared.files import scratch_directory

_PIECE = "piece"
_RESULT = "result"
# Nothing is reported to Ray's makers. Who lacks the token can neither read objects nor run code as this user.
_OWN = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # On a busy machine its processes start slowly.
    "RAY_raylet_start_wait_time_s": "180",
}
_TOKEN_VARIABLE = "RAY_AUTH_TOKEN"  # noqa: S105 - a name
_LINK = ".lazydp-"
# The path of a socket has at most 107 bytes; Ray takes so many below its folder.
_LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")


@dataclass(frozen=True)
class RayEngine:
    """See `job.Engine`.

    cluster: address of a running cluster, such as `auto` or `host:6379`; None: a Ray of one's own, on this machine.
    workers: CPUs of a Ray of one's own.
    """

    cluster: str | None
    workers: int
    name: str = "ray"

    def check(self) -> None:
        """See `job.Engine.check`."""
        # It is not imported yet: when it is, it reads the environment.
        if not is_installed("ray"):
            raise InputError("--engine ray needs the package ray: pip install 'lazydp[ray]'")

    def run(self, job: Job) -> list[bytes]:
        """See `job.Engine.run`."""
        with _connected(self.cluster, self.workers):
            import ray  # noqa: PLC0415 - an extra

            try:
                return _run(job)
            except Exception as error:
                told = error_of_task(error)
                if told is not None:
                    raise told from None
                if isinstance(error, ray.exceptions.RayError):
                    raise gave_up("Ray", error) from None
                raise


@contextlib.contextmanager
def _connected(cluster: str | None, workers: int) -> Iterator[None]:
    """Ray, connected; one of one's own ends with the block, and its files are deleted.

    Raises:
        InputError: the path of the temporary folder is too long for a socket.
        UnavailableError: Ray does not start, or the cluster does not answer.
    """
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"address": cluster}
        if cluster is None:
            folder = stack.enter_context(_short_path(stack.enter_context(scratch_directory("ray"))))
            stack.enter_context(environment(_OWN | {_TOKEN_VARIABLE: _token()}))
            options = {"address": "local", "num_cpus": workers, "include_dashboard": False, "_temp_dir": str(folder)}
        import ray  # noqa: PLC0415 - an extra; it reads the environment
        from ray._private.authentication.authentication_utils import is_token_auth_enabled  # noqa: PLC0415

        if ray.is_initialized():
            raise InputError(
                "this process is connected to a Ray already: call ray.shutdown() first, or give its address"
            )
        if cluster is None and not is_token_auth_enabled():
            raise InputError("ray was imported before, without a token: start a Ray, and give its address")
        stack.enter_context(same_signals())
        stack.callback(ray.shutdown)
        try:
            with same_signals():
                ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            where = f"the Ray cluster {cluster} does not answer" if cluster is not None else "Ray does not start"
            raise UnavailableError(f"{where}: {one_line(error)}") from None
        yield


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[Path]:
    """A link to a folder in the same temporary folder, whose path is short enough for Ray's sockets.

    Raises:
        InputError: the temporary folder's own path is too long.
    """
    base = Path(tempfile.gettempdir())
    for left in base.glob(f"{_LINK}*"):
        # Of a command that was killed, and whose folder is gone.
        if left.is_symlink() and left.lstat().st_uid == os.getuid() and not left.exists():
            left.unlink(missing_ok=True)
    link = base / f"{_LINK}{secrets.token_hex(3)}"
    if len(os.fsencode(link)) > _LONGEST_FOLDER:
        raise InputError(
            f"Ray makes sockets below {base}, and their paths would be too long: set TMPDIR to a shorter path"
        )
    link.symlink_to(folder)
    try:
        yield link
    finally:
        link.unlink()


@functools.cache
def _token() -> str:
    """What a Ray of one's own admits by; the library reads it once in a process."""
    return secrets.token_hex(32)


def _run(job: Job) -> list[bytes]:
    import ray.data  # noqa: PLC0415 - an extra

    def encode(pieces: pa.Table) -> Iterator[pa.Table]:
        for piece in pieces.column(_PIECE).to_pylist():
            for key, payload in job.encode(piece):
                yield pa.Table.from_batches([keyed(key, payload)])

    def assemble(found: pa.Table) -> pa.Table:
        key, payloads = group(found)
        return pa.table({_RESULT: pa.array([job.assemble(key, payloads)], pa.large_binary())})

    with _quiet(), warnings.catch_warnings():
        # A map's `max_retries` is to go in a later version, which the extra excludes.
        warnings.simplefilter("ignore")
        pieces = pa.table({_PIECE: pa.array(job.pieces, pa.large_binary())})
        given = ray.data.from_arrow([pieces.slice(place, 1) for place in range(len(pieces))])
        moved = given.map_batches(encode, batch_size=None, batch_format="pyarrow", max_retries=ATTEMPTS - 1)
        grouped = moved.groupby(PAYLOADS.names[0], num_partitions=job.num_keys)
        made = grouped.map_groups(assemble, batch_format="pyarrow")
        return [row[_RESULT] for row in made.take_all()]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without its bars and its lines about a job's progress."""
    import ray.data  # noqa: PLC0415 - an extra

    log = logging.getLogger("ray.data")
    level, context = log.level, ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    # An error is raised as well: its traceback need not stand on the terminal.
    log.setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    try:
        yield
    finally:
        log.setLevel(level)
        context.enable_progress_bars = bars
