"""From locations to the files of a log: folders, patterns, Hive partitions, tables of a lake; each file once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow.fs as pafs

from lazydp.components.ingest.locations import open_location, shown, unreadable
from lazydp.components.shared.errors import InputError

TableFormat = Literal["Delta", "Iceberg", "Hudi"]
_WILDCARD = re.compile(r"[*?\[]")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_ICEBERG_METADATA = re.compile(r"(^|/)metadata/[^/]*\.metadata\.json(\.gz)?$")
# Data files lie in `data/`, below it in folders of partitions.
_ICEBERG_DEPTH = 4
_MARKS: dict[str, TableFormat] = {"_delta_log": "Delta", ".hoodie": "Hudi"}


@dataclass(frozen=True)
class Found:
    """One file of a log, or one table of a lake.

    Attributes:
        filesystem: where it is.
        path: its path there.
        location: path or URI for messages.
        partitions: values of the columns that its folders name (`day=2024-01-31`), None for a missing value.
        table: the format of a table whose folder this is; None for a file.
        given: of a table, the location as its library takes it, credentials included.
    """

    filesystem: Any
    path: str
    location: str
    partitions: dict[str, str | None] = field(default_factory=dict)
    table: TableFormat | None = None
    given: str = ""


def find(locations: Sequence[str]) -> list[Found]:
    """Every file at the locations: files, folders (at any depth) and patterns (`*`, `?`, `[...]`, `**`).

    In folders, names that begin with a dot or an underscore are not data. A folder that is a Delta or an Iceberg table
    is found as one; its files by themselves would bring deleted rows back.

    Raises:
        InputError: nothing there, a file twice, or a part of a table of a lake.
        UnavailableError: a store does not answer.
    """
    found: list[Found] = []
    for location in locations:
        try:
            found += _at(location)
        except OSError as error:
            raise unreadable(location, error) from None
    _refuse_repeats(found)
    return found


def _at(location: str) -> list[Found]:
    filesystem, path = open_location(location)
    path = path.rstrip("/") or path
    given, location = location, shown(location)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        if not _WILDCARD.search(path):
            raise InputError(f"{location} does not exist")
        return _matching(filesystem, path, location)
    _refuse_inside_table(filesystem, path, location)
    if info.type == pafs.FileType.File:
        return [_file(filesystem, path)]
    return _in_folder(filesystem, path, location, given)


def _in_folder(filesystem: Any, path: str, location: str, given: str = "") -> list[Found]:
    listed = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    table = _table_format(path, (info.path for info in listed), location)
    if table is not None:
        return [Found(filesystem, path, location, table=table, given=given or location)]
    files = sorted(info.path for info in listed if info.type == pafs.FileType.File and not _hidden(info.path, path))
    if not files:
        raise InputError(f"the folder {location} holds no data file")
    return [_file(filesystem, file) for file in files]


def _matching(filesystem: Any, pattern: str, location: str) -> list[Found]:
    base = pattern[: _WILDCARD.search(pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    matches = re.compile(_expression(pattern))
    listed = filesystem.get_file_info(pafs.FileSelector(base or "/", recursive=True, allow_not_found=True))
    found = [info for info in listed if matches.fullmatch(info.path) and not _hidden(info.path, base)]
    files = sorted(info.path for info in found if info.type == pafs.FileType.File)
    folders = sorted(info.path for info in found if info.type == pafs.FileType.Directory)
    result = [_file(filesystem, file) for file in files]
    for folder in folders:
        if not any(folder.startswith(other + "/") for other in folders):
            result += _in_folder(filesystem, folder, folder)
    if not result:
        raise InputError(f"no file matches {location}")
    for folder in {Path(file).parent.as_posix() for file in files} | set(folders):
        _refuse_inside_table(filesystem, f"{folder}/file", location)
    return result


def _expression(pattern: str) -> str:
    """A pattern as a regular expression: `*` and `?` stay within a name, `**/` is any number of folders."""
    expression = ""
    rest = pattern
    while rest:
        if rest.startswith("**/"):
            expression, rest = expression + "(?:[^/]+/)*", rest[3:]
        elif rest[0] == "*":
            expression, rest = expression + "[^/]*", rest[1:]
        elif rest[0] == "?":
            expression, rest = expression + "[^/]", rest[1:]
        elif match := re.match(r"\[([!^]?)([^\]/]+)\]", rest):
            members = re.escape(match[2]).replace(r"\-", "-")
            expression += f"[^{members}]" if match[1] else f"[{members}]"
            rest = rest[match.end() :]
        else:
            expression, rest = expression + re.escape(rest[0]), rest[1:]
    return expression


def _hidden(path: str, folder: str) -> bool:
    inside = path[len(folder) :].strip("/").split("/")
    return any(part.startswith((".", "_")) and "=" not in part for part in inside)


def _file(filesystem: Any, path: str) -> Found:
    partitions: dict[str, str | None] = {}
    for part in path.split("/")[:-1]:
        name, equals, value = part.partition("=")
        if equals and name:
            partitions[unquote(name)] = None if value == _NULL_PARTITION else unquote(value)
    return Found(filesystem, path, path, partitions)


def _table_format(path: str, inside: Iterable[str], location: str) -> TableFormat | None:
    """The format of the table that the folder is.

    Raises:
        InputError: it holds tables further down.
    """
    for name in inside:
        relative = name[len(path) :].strip("/")
        parts = relative.split("/")
        for mark, table in _MARKS.items():
            if mark in parts:
                if parts[0] == mark:
                    return table
                inner = "/".join(parts[: parts.index(mark)])
                raise InputError(f"{location} holds a {table} table at {inner}: name that folder itself")
        if _ICEBERG_METADATA.search(relative):
            if parts[0] == "metadata":
                return "Iceberg"
            raise InputError(f"{location} holds an Iceberg table at {'/'.join(parts[:-2])}: name that folder itself")
    return None


def _refuse_inside_table(filesystem: Any, path: str, location: str) -> None:
    """Refuse files of a table that are named by themselves: some of their rows may have been deleted."""
    above = [parent.as_posix() for parent in Path(path).parents if parent.as_posix() not in ("", ".", "/")]
    candidates = [f"{parent}/{mark}" for parent in above for mark in _MARKS]
    infos = filesystem.get_file_info(candidates) if candidates else []
    for info in infos:
        if info.type != pafs.FileType.NotFound:
            folder, _, mark = info.path.rpartition("/")
            raise InputError(
                f"{location} is a part of the {_MARKS[mark]} table {folder}: its files hold deleted rows; "
                "name the table's folder"
            )
    for parent in above[:_ICEBERG_DEPTH]:
        selector = pafs.FileSelector(f"{parent}/metadata", allow_not_found=True)
        if any(_ICEBERG_METADATA.search(info.path) for info in filesystem.get_file_info(selector)):
            raise InputError(
                f"{location} is a part of the Iceberg table {parent}: its files hold deleted rows; "
                "name the table's folder"
            )


def _refuse_repeats(found: Sequence[Found]) -> None:
    seen: dict[tuple[str, object], str] = {}
    for file in found:
        key = (file.filesystem.type_name, _identity(file))
        if key in seen:
            raise InputError(f"the file {file.path} is given twice: its rows would count double")
        seen[key] = file.path


def _identity(file: Found) -> object:
    """What two names of one file agree in."""
    if isinstance(file.filesystem, pafs.LocalFileSystem):
        status = Path(file.path).stat()
        return status.st_dev, status.st_ino
    return file.path
