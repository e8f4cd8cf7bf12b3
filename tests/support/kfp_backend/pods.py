"""Pods: one process for each attempt of a task, in folders and an environment of its own.

A pod's `python3` is a small client of a server that has imported the libraries already and forks: the process is as
separate as a pod's, and starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

_HERE = Path(__file__).parent
_START_S = 240.0
_POLL_S = 0.02


class PodHost:
    """Starts processes of pods; use it as a context.

    Args:
        folder: for its socket; a short path.
        preload: modules that the server imports before it forks.
    """

    def __init__(self, folder: Path, *, preload: tuple[str, ...]) -> None:
        self._socket = folder / "pods.sock"
        self._log = folder / "pods.log"
        self._preload = preload

    def __enter__(self) -> Self:
        environment = {**os.environ, "_KFP_RUNTIME": "true", "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_HERE / "pod_server.py"), str(self._socket), *self._preload],
                env=environment,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _START_S
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the pod server did not start: {self._log.read_text()}")
            time.sleep(_POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def make_python(self, file: Path) -> None:
        """Write a `python3` that runs a task in a fork of this host, and everything else as Python does."""
        client = f"{sys.executable} -I -S {_HERE / 'pod_client.py'} {self._socket}"
        file.write_text(
            f'#!/bin/sh\n[ "$2" = kfp.dsl.executor_main ] && exec {client} "$@"\nexec {sys.executable} "$@"\n'
        )
        file.chmod(0o755)

    def run(
        self,
        arguments: list[str],
        *,
        pod: Path,
        environment: Mapping[str, str],
        mounts: Mapping[str, Path],
        kill: Callable[[Path], bool] | None = None,
    ) -> tuple[int, str]:
        """Run a container's command to its end; returns its exit status and its log.

        Args:
            arguments: command and arguments.
            pod: an empty folder: the pod's own disk.
            environment: all that the container is given.
            mounts: path in the container -> folder of the volume.
            kill: asked again and again with the pod's folder; once true, the process is killed as by SIGKILL.
        """
        for name in ("bin", "tmp", "home"):
            (pod / name).mkdir(parents=True)
        self.make_python(pod / "bin" / "python3")
        whole = {
            "PATH": f"{pod / 'bin'}:/usr/bin:/bin",
            "HOME": str(pod / "home"),
            "TMPDIR": str(pod / "tmp"),
            "OMP_NUM_THREADS": "1",
            "KFP_BACKEND_POD": str(pod),
            **environment,
        }
        log = pod / "log"
        with _mounted(mounts), log.open("wb") as output:
            process = subprocess.Popen(
                arguments, cwd=pod / "home", env=whole, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
            while process.poll() is None:
                if kill is not None and (pod / "pid").exists() and kill(pod):
                    os.kill(int((pod / "pid").read_text()), signal.SIGKILL)
                    kill = None
                time.sleep(_POLL_S)
        return process.returncode, log.read_text(errors="replace")


@contextlib.contextmanager
def _mounted(mounts: Mapping[str, Path]) -> Iterator[None]:
    """Volumes appear at their paths while the pod lives, and at no other time."""
    made = []
    try:
        for where, folder in mounts.items():
            path = Path(where)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(folder)
            made.append(path)
        yield
    finally:
        for path in made:
            path.unlink()
