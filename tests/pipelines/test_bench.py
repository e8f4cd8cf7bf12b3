"""`lazydp bench pipeline`: what it runs, and what it says of what fails."""

from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from lazydp.components.shared.errors import LazyDPError
from lazydp.pipelines import bench
from lazydp.pipelines.cli import cli


def parsed(arguments: Sequence[str]) -> str:
    """The command that the arguments name; they are parsed as it would parse them, and nothing is run."""
    command: click.Command = cli
    words = list(arguments)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words.pop(0))
        assert found is not None
        command = found
    command.make_context(command.name, words)
    return str(command.name)


def test_both_contestants_do_the_same_work(tmp_path: Path) -> None:
    found = {name: [parsed(command) for command in commands] for name, commands in commands_of(tmp_path).items()}
    assert found == {bench.PIPELINE: ["run"], bench.PLAIN: ["ingest", "set", "train", "export", "evaluate"]}
    with pytest.raises(click.NoSuchOption):
        parsed(["train", "--dataste", "x"])


def commands_of(folder: Path) -> dict[str, list[list[str]]]:
    return bench.commands_of(folder / "sample", folder / "out")


def test_a_command_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(LazyDPError, match=r"`lazydp evaluate .*` failed: .*no bundle at"):
        bench._all([["evaluate", "--bundle", str(tmp_path / "none"), "--dataset", str(tmp_path)]])
