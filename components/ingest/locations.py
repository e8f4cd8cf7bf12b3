"""Paths and URIs: the file system behind one, and small text files read from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from lazydp.components.shared.errors import InputError, UnavailableError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_CREDENTIALS = re.compile(r"(?<=[A-Za-z0-9+.-])://[^/?#]*@")
_OF_PYARROW = {"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs"}


def is_uri(location: str) -> bool:
    """Whether the location names a scheme, such as s3://bucket/folder."""
    return _SCHEME.match(location) is not None


def shown(location: str | Path) -> str:
    """The location as it may be told: a URI without the key and the secret that may stand before its bucket."""
    return _CREDENTIALS.sub("://", str(location), count=1)


def open_location(location: str | Path) -> tuple[Any, str]:
    """The pyarrow file system of a path or URI, and the path in it.

    pyarrow's own file systems (file, s3, gs, abfs, hdfs) come first, then any that fsspec knows.

    Raises:
        InputError: no such scheme, or its package is not installed.
    """
    text = str(location)
    if not is_uri(text):
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    scheme = text.split("://", 1)[0]
    if scheme in _OF_PYARROW:
        try:
            filesystem, path = pafs.FileSystem.from_uri(_with_escaped_wildcards(text))
        except (pa.ArrowException, ValueError, OSError) as error:
            raise InputError(f"{shown(text)} is no location that can be opened: {one_line(error)}") from None
        return filesystem, path
    import fsspec  # noqa: PLC0415 - only for schemes that pyarrow lacks

    try:
        filesystem, path = fsspec.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise InputError(f"{shown(text)}: the scheme {scheme}:// cannot be opened: {one_line(error)}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def resolve_location(location: str, base: str | Path) -> str:
    """A path of a spec relative to the folder `base` (itself a path or URI); absolute paths and URIs stay."""
    if is_uri(location) or Path(location).expanduser().is_absolute():
        return location
    return f"{str(base).rstrip('/')}/{location}" if is_uri(str(base)) else str(Path(base) / location)


def read_text(location: str | Path) -> str:
    """A small text file in UTF-8 by path or URI, without a byte-order mark.

    Raises:
        InputError: it does not exist, or is not UTF-8.
        UnavailableError: its store does not answer.
    """
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read()).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{shown(location)} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(location)} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise unreadable(location, error) from None


def unreadable(
    location: str | Path, error: Exception, *, filesystem: Any = None, what: str = ""
) -> InputError | UnavailableError:
    """The error for a location that could not be read: a store that does not answer, or a file that is no good.

    Args:
        location: path or URI.
        error: what was raised.
        filesystem: where a path lies; None for this machine.
        what: what it was read as, such as "Parquet".
    """
    of_store = is_uri(str(location)) and not str(location).startswith("file://")
    if filesystem is not None:
        of_store = not isinstance(filesystem, pafs.LocalFileSystem)
    if of_store and isinstance(error, OSError):
        return UnavailableError(f"{shown(location)} does not answer: {one_line(error)}")
    return InputError(f"{shown(location)} cannot be read{what and f' as {what}'}: {one_line(error)}")


def one_line(error: Exception) -> str:
    """The message of a library's error on one line, of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."


def _with_escaped_wildcards(uri: str) -> str:
    """The URI with the wildcards of its path as escapes: what stands after a bare `?` would be read as options."""
    head, mark, options = uri.partition("?")
    escaped = head.replace("[", "%5B").replace("]", "%5D")
    # Options are `name=value`; anything else after a question mark belongs to a pattern.
    if mark and "=" not in options.split("/", 1)[0]:
        return escaped + "%3F" + _with_escaped_wildcards(options)
    return escaped + mark + options
