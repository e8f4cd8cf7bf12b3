"""The first run on a log never seen before: no file by hand, and a private model that beats popularity."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from lazydp.components.bundle.reader import Bundle
from lazydp.components.features.spec_file import read_spec
from lazydp.components.shared.running_service import running_service
from lazydp.pipelines.cli import cli

GROUPS = 4


def taken(users: int, items: int, *, seed: int = 0) -> list[tuple[int, int, int]]:
    """Rows (user, item, minute) of users who mostly take items of one group."""
    chance = random.Random(seed)
    rows = []
    for user in range(users):
        own = [item for item in range(items) if item % GROUPS == user % GROUPS]
        others = [item for item in range(items) if item % GROUPS != user % GROUPS]
        found = chance.sample(own, 8) + chance.sample(others, 2)
        chance.shuffle(found)
        rows += [(user, item, minute) for minute, item in enumerate(found)]
    chance.shuffle(rows)
    return rows


def write(path: Path, rows: list[list[object]], *, delimiter: str = ",", encoding: str = "utf-8") -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    content = text.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def films(folder: Path, users: int, items: int) -> None:
    """Semicolons, a byte-order mark, marks in names, ratings, times with a zone."""
    at = [datetime.fromtimestamp(1_700_000_000 + 60 * minute, UTC).isoformat() for minute in range(99)]
    log: list[list[object]] = [["Viewer No.", "Film-ID", "Stars (1-5)", "Rated At"]]
    log += [[f"{user:05d}", item + 1, 1 + user % 5, at[minute]] for user, item, minute in taken(users, items)]
    write(folder / "log.csv", log, delimiter=";", encoding="utf-8-sig")
    catalogue: list[list[object]] = [["Film-ID", "Film Title", "Genres"]]
    catalogue += [[item + 1, f"Film; {item}", f"genre {item % GROUPS}"] for item in range(items)]
    write(folder / "items.csv", catalogue, delimiter=";", encoding="utf-8-sig")


def places(folder: Path, users: int, items: int) -> None:
    """Two columns, packed; ids with zeros before them; no time, no title, no feature."""
    log: list[list[object]] = [["person", "place"]]
    log += [[f"u{user}", f"{item:04d}"] for user, item, _ in taken(users, items)]
    write(folder / "log.csv.gz", log)
    catalogue: list[list[object]] = [["place"]]
    catalogue += [[f"{item:04d}"] for item in range(items)]
    write(folder / "items.csv", catalogue)


def shop(folder: Path, users: int, items: int) -> None:
    """Quoted line breaks, milliseconds, missing values, a column of which each row has another value."""
    log: list[list[object]] = [["eventId", "customer number", "skuCode", "ts_ms", 'device "type"', "comment"]]
    for number, (user, item, minute) in enumerate(taken(users, items)):
        at = 1_700_000_000_000 + 60_000 * minute
        log.append([number, user - 3, f"SKU {item}", at, ["phone", ""][number % 2], ["", "a\nb, c", '"'][number % 3]])
    write(folder / "log.csv", log)
    catalogue: list[list[object]] = [["SKU code", "description", "price EUR", "cat2"]]
    catalogue += [[f"SKU {item}", f'Größe "{item}",\nkind {item % GROUPS}', item / 4, ""] for item in range(items)]
    write(folder / "items.csv", catalogue)


LOGS = {"films": films, "places": places, "shop": shop}
Make = Callable[[Path, int, int], None]


def invoked(*words: object) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def log_of(folder: Path) -> Path:
    (found,) = folder.glob("log.csv*")
    return found


@pytest.mark.parametrize("make", LOGS.values(), ids=LOGS.keys())
def test_names_of_columns_are_enough(tmp_path: Path, make: Make) -> None:
    make(tmp_path, 40, 40)
    sizes = ["--users", 40, "--interactions", 400, "--out", tmp_path / "made"]
    said = invoked("init", "--input", log_of(tmp_path), "--items", tmp_path / "items.csv", *sizes)
    assert f"--budget-epsilon 8 --out {tmp_path / 'made' / 'out'}" in said
    spec = read_spec(tmp_path / "made" / "spec.yaml")
    assert spec.name == "log"
    common = ["--input", log_of(tmp_path), "--spec", tmp_path / "made" / "spec.yaml"]
    assert "400 rows, of which 400 can be used" in invoked("ingest", *common, "--check")


@pytest.mark.slow
@pytest.mark.parametrize("make", LOGS.values(), ids=LOGS.keys())
def test_four_commands_lead_to_the_first_recommendation(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What README shows: init, pipeline run, serve, and a question."""
    monkeypatch.setenv("LAZYDP_LEDGER", f"sqlite:///{tmp_path / 'ledger.db'}")
    make(tmp_path, 2000, 200)
    program = [sys.executable, "-c", "from lazydp.pipelines.cli import main; main()"]
    asked = ["init", "--input", log_of(tmp_path).name, "--items", "items.csv"]
    subprocess.run([*program, *asked, "--users", "2000", "--interactions", "20000"], check=True, cwd=tmp_path)
    made = ["--input", log_of(tmp_path).name, "--spec", "spec.yaml", "--config", "train.yaml", "--out", "out"]
    subprocess.run([*program, "pipeline", "run", *made, "--budget-epsilon", "8"], check=True, cwd=tmp_path)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["model"]["hr_at_10"] > 1.2 * metrics["popularity"]["hr_at_10"]
    statement = Bundle.open(tmp_path / "out" / "bundle").statement
    assert (statement.private, statement.privacy_unit) == (True, "user")
    assert (statement.epsilon or 9) <= 8
    with running_service(tmp_path / "out" / "bundle") as url:
        answer = httpx.post(f"{url}/v1/recommendations", json={"k": 3}).json()
    assert len(answer["items"]) == 3
