"""Imports what components need, then forks one process for each pod that a `pod_client.py` asks for."""

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.shared.version import code_version

sys.path.insert(0, str(Path(__file__).parents[2]))
from support import known_key

_LOOPBACK = ("127.", "::1", "localhost")


def serve(path: str, preload: list[str]) -> None:
    """Fork for every connection, until terminated."""
    for name in ["kfp.dsl.executor_main", *preload]:
        importlib.import_module(name)
    code_version()  # which each process computes once
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}.new")
    server.listen()
    Path(f"{path}.new").rename(path)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            pod(connection)
        connection.close()


def pod(connection: socket.socket) -> None:
    """The process of one pod, which never returns."""
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 22, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 22)
    request = json.loads(text)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    status = 1
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        root = os.environ["KFP_BACKEND_POD"]
        Path(f"{root}/pid.new").write_text(str(os.getpid()))
        Path(f"{root}/pid.new").rename(f"{root}/pid")
        status = run(request["arguments"], root)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{status}\n".encode())
    os._exit(status)


def run(arguments: list[str], root: str) -> int:
    """`python3 -m MODULE ARGUMENTS...` with the pod's folder as the root of artifacts, and no network."""
    from kfp.dsl.types import artifact_types

    assert arguments[:2] == ["-m", "kfp.dsl.executor_main"], arguments
    artifact_types._MINIO_LOCAL_MOUNT_PREFIX = f"{root}/minio/"
    if known_key.VARIABLE in os.environ:
        known_key.replace(os.environ[known_key.VARIABLE], pytest.MonkeyPatch())
    # What a new process reads as it loads torch.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.addaudithook(no_network)
    sys.argv = arguments[1:]
    sys.path.insert(0, str(Path.cwd()))
    from kfp.dsl.executor_main import executor_main

    try:
        executor_main()
    except SystemExit as exited:
        return exited.code if isinstance(exited.code, int) else 1
    return 0


def no_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse to reach anything but this machine."""
    if event == "socket.connect":
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments
    else:
        return
    if isinstance(address, tuple) and address[0] and not str(address[0]).startswith(_LOOPBACK):
        raise OSError(f"no network in this pod: {address[0]} was asked for")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
