"""The service as a process of its own, for as long as somebody asks it: `lazydp serve` on a free loopback port."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

from lazydp.components.shared.errors import UnavailableError

SETTING_PREFIX = "LAZYDP_SERVE_"
_START_S, _STOP_S, _REQUEST_S = 120.0, 15.0, 30.0
_TAIL = 2000


@contextlib.contextmanager
def running_service(bundle: Path, *, ledger_url: str = "", settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run `lazydp serve` on `bundle`; yields its base URL once it is ready, and stops it at the end.

    Args:
        bundle: folder of the bundle.
        ledger_url: of the ledger that it reads; empty: the one that a service finds by itself.
        settings: `LAZYDP_SERVE_...` by name. Those of this process's environment are for another service: it gets none.

    Raises:
        UnavailableError: the service ended or was not ready within two minutes; the end of its log is in the message.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTING_PREFIX)}
    with tempfile.TemporaryDirectory(prefix="lazydp-serve-") as folder:
        port_file, log = Path(folder) / "port", Path(folder) / "log"
        command = [sys.executable, "-m", "lazydp.pipelines.cli", "serve", "--bundle", str(bundle)]
        command += [*(["--ledger", ledger_url] if ledger_url else []), "--port", "0", "--port-file", str(port_file)]
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own command
                command, stdout=output, stderr=output, env={**environment, **(settings or {})}
            )
        try:
            yield _url_when_ready(process, port_file, log)
        finally:
            # Not SIGTERM: no load balancer stands before it, so it need not go on accepting for a while.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _url_when_ready(process: subprocess.Popen[bytes], port_file: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        if port_file.exists() and (port := port_file.read_text().strip()):
            url = f"http://127.0.0.1:{port}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz", timeout=_REQUEST_S).status_code == httpx.codes.OK:
                    return url
        time.sleep(0.05)
    state = "ended" if process.poll() is not None else f"was not ready within {_START_S:.0f} s"
    raise UnavailableError(f"the service {state}; its log ends with:\n{log.read_text(errors='replace')[-_TAIL:]}")
