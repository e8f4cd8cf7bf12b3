"""The loader's benchmark: what it prints, not how fast it was."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazydp.components.bench import loader
from lazydp.components.bench.loader_cli import command
from support.tiny import Tiny


def test_every_contestant_is_measured(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    # Folders of tests may lie in memory, where nothing is read from a disk.
    reads = count(0, 3 * 2 * 4096)
    monkeypatch.setattr(loader, "_bytes_from_disk", lambda: next(reads))
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(loader, "_read_at_random", lambda file, pages: asked.append((file, pages)))
    done = CliRunner().invoke(
        command, ["--dataset", str(tiny.dataset), "--steps", "2", "--repeats", "1", "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    results = [json.loads(line) for line in done.output.splitlines()]
    assert [result["contestant"] for result in results] == ["warm", "read_ahead", "one_by_one", "disk"]
    assert {result["shape"]["pages"] for result in results} == {3}
    assert {pages for _, pages in asked} == {6}
    assert all(file.is_file() for file, _ in asked)
