"""Which ledger: given by URL, in the environment, in a file, or the one that every user has."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_DIRECTORY

URL_VARIABLE = "LAZYDP_LEDGER"
FILE_VARIABLE = "LAZYDP_LEDGER_FILE"
# Where the default was before there was one ledger for each user.
_FORMER_DEFAULT = "lazydp-ledger.db"
_PASSWORD = re.compile(r"^(?!sqlite).*(//[^/@]*:[^/@]+@|[?&]password=)")


def default_ledger_url() -> str:
    """LAZYDP_LEDGER; or what the file LAZYDP_LEDGER_FILE holds; or the user's own ledger, whose folder is made.

    One ledger for each user: a ledger for each working folder would give the same people a fresh budget in each.

    Raises:
        InputError: the file cannot be read; or the working folder holds a ledger that was the default once.
    """
    given = os.environ.get(URL_VARIABLE, "").strip()
    if given:
        return given
    file = os.environ.get(FILE_VARIABLE, "").strip()
    if file:
        try:
            return Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{FILE_VARIABLE} names {file}, which cannot be read: {error}") from error
    own = user_ledger()
    former = Path(_FORMER_DEFAULT)
    if former.exists():
        raise InputError(
            f"{former.absolute()} was the default ledger of an older lazydp, and now it is {own}: say which one you "
            f"mean, with --ledger sqlite:///{_FORMER_DEFAULT} or {URL_VARIABLE}, or move it there with its .secret"
        )
    own.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_DIRECTORY)
    return f"sqlite:///{own}"


def user_ledger() -> Path:
    """The file of the user's own ledger: XDG_DATA_HOME/lazydp/ledger.db, by default in ~/.local/share."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "lazydp" / "ledger.db"


def ledger_option(help_text: str) -> Callable[[Any], Any]:
    """The option `--ledger`; a password in it is refused, for command lines are read by every user of a machine."""
    return click.option("--ledger", envvar=URL_VARIABLE, callback=_without_password, help=help_text)


def is_on_the_command_line(context: click.Context, name: str = "ledger") -> bool:
    """Whether the option was typed, and did not come from the environment."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _without_password(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value and parameter.name and is_on_the_command_line(context, parameter.name) and _PASSWORD.search(value):
        raise InputError(
            f"--ledger holds a password, which every user of this machine can read in its list of processes: put the "
            f"URL into {URL_VARIABLE}, or into a private file that {FILE_VARIABLE} names"
        )
    return value


LEDGER = ledger_option("URL of the ledger.  [default: LAZYDP_LEDGER_FILE, or ~/.local/share/lazydp/ledger.db]")
