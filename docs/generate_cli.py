"""Writes docs/cli.md from the commands themselves: `make docs`. A test keeps the two equal."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import click

from lazydp.pipelines.cli import cli


def commands(
    group: click.Group, path: tuple[str, ...], ctx: click.Context
) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command below `group` with the words that call it, in the order of `--help`."""
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        found.append(((*path, name), command))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name), click.Context(command, info_name=name, parent=ctx))
    return found


def reference() -> str:
    """The page, as Markdown."""
    settings = {**cli.context_settings, "max_content_width": 100, "terminal_width": 100}
    root = click.Context(cli, info_name="lazydp", **settings)
    parts = ["# The commands\n\nMade by `make docs` from the commands' own help.\n"]
    for words, command in commands(cli, (), root):
        parent = root
        for word in words[:-1]:
            parent = click.Context(click.Command(word), info_name=word, parent=parent)
        fresh = copy.copy(command)
        fresh._help_option = None  # kept from the first context that asked for it, which may have named it otherwise
        context = click.Context(fresh, info_name=words[-1], parent=parent, **settings)
        parts.append(f"## lazydp {' '.join(words)}\n\n```text\n{fresh.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(__file__).with_name("cli.md")
    target.write_text(reference())
    sys.stdout.write(f"wrote {target}\n")
