"""Ledgers to test on: SQLite always, PostgreSQL where its binaries are (a private cluster on loopback)."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from lazydp.components.budget.ledger.ledger import Ledger

IDENTIFIER = "a" * 64


@pytest.fixture(autouse=True)
def operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who signs what the ledger records."""
    monkeypatch.setenv("LAZYDP_OPERATOR", "tester")


def _postgres_binaries() -> Path | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    if folders and (folders[-1] / "initdb").exists():
        return folders[-1]
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def _owner() -> str | None:
    """PostgreSQL refuses to run as root: the user to run it as, or None for the present one."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


@contextlib.contextmanager
def _cluster(binaries: Path) -> Iterator[str]:
    owner = _owner()
    folder = Path(tempfile.mkdtemp(prefix="lazydp-postgres-"))
    if owner is not None:
        shutil.chown(folder, user=owner)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}

    def run(*command: str) -> None:
        done = subprocess.run(
            command, user=owner, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    data = str(folder / "data")
    run(str(binaries / "initdb"), "-D", data, "-U", "lazydp", "-A", "trust", "-E", "UTF8", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c max_connections=300 -c fsync=off"
    # pg_ctl would wait for the server to close its inherited pipes: it logs to a file instead.
    log = str(folder / "log")
    subprocess.run(
        [str(binaries / "pg_ctl"), "-D", data, "-w", "-l", log, "-o", options, "start"],
        user=owner,
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"postgresql://lazydp@127.0.0.1:{port}"
    finally:
        run(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a private PostgreSQL server, without a database."""
    binaries = _postgres_binaries()
    if binaries is None:
        why = "no PostgreSQL binaries here (apt-get install postgresql)"
        if os.environ.get("LAZYDP_REQUIRE_POSTGRES") == "1":
            pytest.fail(f"LAZYDP_REQUIRE_POSTGRES=1, but {why}")
        pytest.skip(why)
    with _cluster(binaries) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """The URL of an empty PostgreSQL database: one for all tests, swept before each."""
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = 'ledger'").fetchone() is None:
            connection.execute("CREATE DATABASE ledger")
    url = f"{postgres_server}/ledger"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database of each kind."""
    url = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    assert isinstance(url, str)
    return url


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A ledger with one dataset of budget epsilon 3 at delta 1e-5."""
    with Ledger.open(ledger_url) as opened:
        opened.register_dataset(IDENTIFIER, name="shop")
        opened.set_budget("shop", epsilon=3.0, delta=1e-5, by="officer")
        yield opened
