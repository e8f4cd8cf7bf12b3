"""The real commands, killed between each pair of steps from the reservation to the release, and started again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.storage.base import SCHEMAS
from lazydp.components.bundle.reader import Bundle
from support.forks import Fork

PROGRAM = Path(__file__).with_name("killed_command.py")
TESTS = Path(__file__).resolve().parents[2]
SETTINGS = {"steps": 3, "checkpoint_every": 2, "log_every": 100}
# Where a kill would do most harm if the order were wrong; the slow tests take every point there is.
DURING_TRAIN = ("before append 2", "after append 2", "before rename 2", "after step 2", "after destroy 1")
DURING_EXPORT = ("before save 1", "after append 1", "after commit 1", "before destroy_file 2", "before rename 2")


def as_fork(given: dict[str, Any]) -> int:
    """From a server that has everything imported: what the command does, without the seconds of its imports."""
    return Fork(PROGRAM, given={"GIVEN": given}).wait()


def as_program(given: dict[str, Any]) -> int:
    """A process of its own, as a shell would start it."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(PROGRAM), json.dumps(given)]
    return subprocess.run(command, check=False, timeout=120, env=environment).returncode


Launcher = Callable[[dict[str, Any]], int]


@dataclass
class Commands:
    """`lazydp train` and `lazydp export` on one dataset, in a folder of their own."""

    folder: Path
    dataset: Path
    launch: Launcher
    url: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.url = self.url or f"sqlite:///{self.folder / 'ledger.db'}"

    def copy(self, name: str) -> Commands:
        """Everything as it stands, ledger included, to try something else on."""
        folder = self.folder.with_name(name)
        shutil.copytree(self.folder, folder)
        return Commands(folder, self.dataset, self.launch)

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def train(self, *, kill_at: str = "", database: str = "") -> int:
        given = ["--dataset", str(self.dataset), "--config", str(self.folder / "train.yaml")]
        return self._run(["train", *given, "--out", str(self.folder / "run"), "--resume"], kill_at, database)

    def export(self, *, kill_at: str = "", database: str = "") -> int:
        given = ["--run", str(self.folder / "run"), "--dataset", str(self.dataset)]
        return self._run(["export", *given, "--out", str(self.bundle)], kill_at, database)

    def void(self, *options: str) -> int:
        [run_id] = self.runs()
        return self._run(["budget", "void", run_id, *options], "", "")

    def _run(self, arguments: list[str], kill_at: str, database: str) -> int:
        trace, output = self.folder / "trace", self.folder / "output"
        trace.write_text("")
        status = self.launch(
            {
                "arguments": [*arguments, "--ledger", self.url],
                "kill_at": kill_at,
                "trace": str(trace),
                "output": str(output),
                "database": database,
            }
        )
        self.output = output.read_text()
        return status

    def trace(self) -> list[str]:
        """The points that the latest command passed."""
        return (self.folder / "trace").read_text().splitlines()

    def runs(self) -> dict[str, str]:
        """Status by run id; the ledger must verify."""
        if not (self.folder / "ledger.db").exists():
            return {}
        with Ledger.open(self.url, read_only=True) as ledger:
            entries = ledger.entries()
            assert verify(entries).problems == ()
            return {run.run_id: run.status for run in ledger.runs()}

    def keys(self) -> list[Path]:
        return list((self.folder / "run").rglob("noise.key"))


@pytest.fixture
def commands(tiny: Any, tmp_path: Path) -> Commands:
    tiny.ledger()
    (tmp_path / "start").mkdir()
    for file in tmp_path.glob("ledger.db*"):
        file.rename(tmp_path / "start" / file.name)
    made = Commands(tmp_path / "start", tiny.dataset, as_fork)
    (made.folder / "train.yaml").write_text(yaml.safe_dump(tiny.config(**SETTINGS).model_dump(mode="json")))
    return made


def kill_train(start: Commands, point: str) -> None:
    killed = start.copy(f"train-{point}".replace(" ", "-"))
    assert killed.train(kill_at=point) == -signal.SIGKILL, killed.output
    trained = any("step" in passed for passed in killed.trace())
    statuses = list(killed.runs().values())
    assert statuses == ["reserved"] if trained else statuses in ([], ["reserved"])
    if "after rename 3" not in killed.trace():  # the last checkpoint stands: it may be released
        assert killed.export() == 1
    assert not killed.bundle.exists()
    # The same command finishes, and is the same run.
    assert killed.train() == 0, killed.output
    assert list(killed.runs().values()) == ["reserved"]


def kill_export(start: Commands, point: str) -> None:
    killed = start.copy(f"export-{point}".replace(" ", "-"))
    assert killed.export(kill_at=point) == -signal.SIGKILL, killed.output
    if killed.bundle.exists():
        assert point == "after rename 2"
        assert list(killed.runs().values()) == ["committed"]
        assert not killed.keys()
    # The same command finishes, and charges once.
    assert killed.export() == 0, killed.output
    assert Bundle.open(killed.bundle).statement.private
    assert list(killed.runs().values()) == ["committed"]
    with Ledger.open(killed.url) as ledger:
        assert [entry.kind for entry in ledger.entries()].count("committed") == 1
    assert not killed.keys()
    assert not list(killed.folder.glob(".*bundle*"))


@pytest.mark.parametrize("point", DURING_TRAIN)
def test_train_killed(point: str, commands: Commands) -> None:
    kill_train(commands, point)


def test_export_killed(commands: Commands) -> None:
    assert commands.train() == 0, commands.output
    for point in DURING_EXPORT:
        kill_export(commands, point)


@pytest.mark.slow
def test_every_point_of_train(commands: Commands) -> None:
    whole = commands.copy("whole")
    assert whole.train() == 0, whole.output
    points = whole.trace()
    assert set(DURING_TRAIN) <= set(points)
    for point in points:
        kill_train(commands, point)


@pytest.mark.slow
def test_every_point_of_export(commands: Commands) -> None:
    assert commands.train() == 0, commands.output
    whole = commands.copy("whole")
    assert whole.export() == 0, whole.output
    points = whole.trace()
    assert set(DURING_EXPORT) <= set(points)
    assert points[-1] == "after rename 2"
    for point in points:
        kill_export(commands, point)


@pytest.mark.slow
def test_programs_of_their_own_behave_as_forks_do(commands: Commands) -> None:
    commands.launch = as_program
    for point in DURING_TRAIN:
        kill_train(commands, point)
    assert commands.train() == 0, commands.output
    for point in DURING_EXPORT:
        kill_export(commands, point)


def test_a_crashed_run_stays_reserved_until_it_is_voided_by_name(commands: Commands) -> None:
    assert commands.train(kill_at="after step 2") == -signal.SIGKILL
    assert list(commands.runs().values()) == ["reserved"]
    assert commands.void("--by", "A. Turing") == 2
    assert commands.void("--by", "A. Turing", "--reason", " ") == 1
    assert list(commands.runs().values()) == ["reserved"]
    assert commands.void("--by", "A. Turing", "--reason", "crashed; checkpoints deleted") == 0
    assert list(commands.runs().values()) == ["voided"]
    # What was voided neither goes on nor comes out.
    for refused in (commands.train, commands.export):
        assert refused() == 1
    assert commands.train() == 1
    assert "was voided (crashed; checkpoints deleted)" in commands.output
    assert "before step 1" not in commands.trace()


def one_line(commands: Commands) -> str:
    assert "Traceback" not in commands.output
    [line] = [line for line in commands.output.splitlines() if line.startswith("lazydp: ")]
    return line


def lock(commands: Commands) -> sqlite3.Connection:
    connection = sqlite3.connect(commands.folder / "ledger.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def execute(commands: Commands, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(commands.folder / "ledger.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def fill(commands: Commands) -> None:
    """Every entry needs more room than the connection is then allowed."""
    execute(
        commands,
        "CREATE TABLE filler (x BLOB)",
        "CREATE TRIGGER fill BEFORE INSERT ON lazydp_entries BEGIN INSERT INTO filler VALUES (zeroblob(99999)); END",
    )


def schema(version: str) -> Callable[[Commands], None]:
    return lambda commands: execute(commands, f"UPDATE lazydp_schema SET version_num = '{version}'")


def down(commands: Commands) -> None:
    commands.url = "postgresql://u@127.0.0.1:9/ledger"


AILMENTS: dict[str, tuple[Callable[[Commands], Any], str]] = {
    "down": (down, r"refused"),
    "full": (fill, r"full: make room and try again; nothing was recorded"),
    "locked": (lock, r"held its lock"),
    "older": (schema(SCHEMAS[0]), r"schema 0001, this lazydp needs 0002: run `lazydp budget migrate`"),
    "newer": (schema("0099"), r"schema 0099, this lazydp reads up to 0002: use a newer lazydp"),
}


@pytest.mark.parametrize("ailment", list(AILMENTS))
def test_a_database_that_ails(ailment: str, commands: Commands) -> None:
    ail, says = AILMENTS[ailment]
    ready = commands.copy("ready")
    assert ready.train() == 0, ready.output
    before = ready.runs()
    for ailing, command in ((commands, commands.train), (ready, ready.export)):
        healthy = ailing.url
        held = ail(ailing)
        assert command(database=ailment) == 1, ailing.output
        assert says in one_line(ailing)
        assert "secret" not in ailing.output
        if held is not None:
            held.close()
        ailing.url = healthy
        if ailment in ("older", "newer"):
            schema(SCHEMAS[-1])(ailing)
        if ailment == "full":
            execute(ailing, "DROP TRIGGER fill")
        assert "before step 1" not in ailing.trace()
    assert commands.runs() == {}
    assert not list(commands.folder.rglob("state.safetensors"))
    assert ready.runs() == before
    assert not ready.bundle.exists()
    assert ready.keys()
    # Once the database is well, the same commands do what they were asked.
    assert commands.train() == 0, commands.output
    assert ready.export() == 0, ready.output
