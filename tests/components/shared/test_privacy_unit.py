"""Every command takes the words of the configuration for a privacy unit, and `person`."""

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from lazydp.components.shared.privacy_unit import PrivacyUnitOption
from lazydp.pipelines.cli import cli


def options(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Option]]:
    """Options that name a privacy unit, of this command and all below."""
    for option in command.params:
        if isinstance(option, click.Option) and {"--privacy-unit", "--unit"} & set(option.opts):
            yield context.command_path, option
    if not isinstance(command, click.Group):
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from options(found, click.Context(found, info_name=name, parent=context))


def test_every_command_takes_the_same_words() -> None:
    found = dict(options(cli, click.Context(cli, info_name="lazydp")))
    names = {"init", "plan", "budget set", "bench quality", "bench search"}
    assert set(found) == {f"lazydp {name}" for name in names}
    for option in found.values():
        assert isinstance(option.type, PrivacyUnitOption)
        assert "--privacy-unit" in option.opts


@pytest.mark.parametrize("word", ["user", "person", "example"])
def test_a_person_is_a_user(word: str) -> None:
    assert PrivacyUnitOption().convert(word, None, None) == ("example" if word == "example" else "user")


@pytest.mark.parametrize("option", ["--unit", "--privacy-unit"])
def test_a_plan_by_either_word_is_the_same(option: str) -> None:
    given = ["plan", "--users", "1000", "--items", "100", "--epsilon", "3"]
    plans = {word: CliRunner().invoke(cli, [*given, option, word]) for word in ("user", "person", "example", "people")}
    assert plans["user"].output == plans["person"].output != plans["example"].output
    assert "privacy_unit: user" in plans["user"].output
    assert plans["people"].exit_code == 2
    assert "'people' is not one of 'user', 'example'" in plans["people"].output
