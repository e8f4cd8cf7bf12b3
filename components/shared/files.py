"""Files that are whole or absent: atomic writes, digests, and JSON that names its format version."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lazydp.components.shared.errors import FormatError, InputError

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700
PUBLIC_FILE = 0o644
PUBLIC_DIRECTORY = 0o755
_TEMPORARY = ".lazydp-partial."
_REPLACED = "replaced"
# As a path, whose slashes are joined, or as it was written.
_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/")


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, *, mode: int = PUBLIC_FILE) -> None:
    """Write `path` whole or not at all: a temporary name beside it, synced, then renamed."""
    with partial_file(path, data, mode=mode) as temporary:
        temporary.replace(path)
    sync_directory(path.parent)


@contextlib.contextmanager
def partial_file(path: Path, data: bytes, *, mode: int) -> Iterator[Path]:
    """Yield a synced file beside `path` that holds `data`, to be renamed or linked; its own name is gone afterwards.

    What a killed process left in the same folder is removed by the next one that writes a file there.
    """
    _remove_abandoned_files(path.parent)
    descriptor, temporary = _locked_file(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Mapping[str, Any], *, format_version: int, mode: int = PUBLIC_FILE) -> None:
    """Write `document` as JSON with `format_version` first."""
    text = json.dumps({"format_version": format_version, **document}, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode(), mode=mode)


def read_json(path: Path, *, format_version: int, what: str) -> dict[str, Any]:
    """Read a JSON document of ours.

    Args:
        path: the file.
        format_version: the newest version this code reads.
        what: what the file is called in errors ("dataset", "bundle manifest").

    Raises:
        FormatError: missing, not JSON, not an object, or of a newer format; the message names the file.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(f"no {what} at {path}: the file does not exist") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{what} {path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise FormatError(f"{what} {path}: expected a JSON object, found {type(document).__name__}")
    found = document.pop("format_version", None)
    if not isinstance(found, int) or isinstance(found, bool):
        raise FormatError(f"{what} {path} carries no format_version: it was not written by lazydp")
    if found > format_version:
        raise FormatError(
            f"{what} {path} has format_version {found}, this lazydp reads up to {format_version}: use a newer lazydp"
        )
    return document


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_directory(path: Path, *, mode: int = PUBLIC_DIRECTORY, replaces: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well.

    Every file in it is synced first; if the block raises (Ctrl-C included), nothing is left. What a killed process left
    in the same place is removed by the next one that writes there.

    Args:
        path: the folder; an empty one may be there.
        mode: its permissions.
        replaces: a folder that holds a file of this name is one of the same kind, and is replaced; None: none is.

    Raises:
        InputError: `path` exists, is not empty, and is not to be replaced; or it is a URI.
    """
    require_local(path)
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if replaces is None:
            raise InputError(f"{path} already exists: choose another output folder or remove it first")
        if not (path / replaces).is_file():
            raise InputError(
                f"{path} already exists and holds no {replaces}, so it isn't what would be replaced: "
                "choose another output folder or remove it yourself"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_directory(path) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_dir():
                sync_directory(file)
            else:
                sync_file(file)
        temporary.chmod(mode)
        sync_directory(temporary)
        if path.exists():
            # rename(2) replaces an empty folder only; the old one steps aside first.
            with _temporary_directory(path) as aside:
                path.rename(aside / _REPLACED)
                try:
                    temporary.rename(path)
                except BaseException:
                    (aside / _REPLACED).rename(path)
                    raise
        else:
            temporary.rename(path)
        sync_directory(path.parent)


@contextlib.contextmanager
def scratch_directory(name: str) -> Iterator[Path]:
    """Yield a private folder under the system's temporary one (`TMPDIR`), which is gone afterwards.

    What a killed process left there is removed by the next one of the same user.

    Raises:
        InputError: somebody else could read what is written there.
    """
    base = Path(tempfile.gettempdir()) / f"lazydp-{os.getuid()}"
    base.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
    status = base.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InputError(f"{base} is to hold private files, and is no private folder of yours: remove it")
    with _temporary_directory(base / name) as folder:
        yield folder


def require_local(path: Path) -> None:
    """Refuse a URI where a folder on this machine is written: taken as a path, `s3://bucket` is a folder named `s3:`.

    Raises:
        InputError: it is one.
    """
    if _URI.match(str(path)):
        raise InputError(f"{path} is a URI, and output is written to a folder on this machine: name one, and copy it")


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is locked while this process works in it, and gone afterwards."""
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        # Nobody removes the new folder between its making and its lock.
        _lock(parent, wait=True)
        _remove_abandoned(path.parent)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_TEMPORARY}{path.name}."))
        descriptor = os.open(temporary, os.O_RDONLY)
        _lock(descriptor, wait=False)
    finally:
        os.close(parent)
    try:
        yield temporary
    finally:
        _remove(temporary, descriptor)


def _locked_file(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open for writing, that is locked until it is closed."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_TEMPORARY}{path.name}.")
        _lock(descriptor, wait=True)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # another process took it for abandoned before it was locked


def _remove_abandoned_files(folder: Path) -> None:
    """Remove temporary files whose process is gone."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        if left.is_symlink() or not left.is_file():
            continue
        try:
            descriptor = os.open(left, os.O_RDONLY)
        except OSError:
            # Somebody else's, or removed meanwhile.
            continue
        try:
            if _lock(descriptor, wait=False):
                left.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _remove(folder: Path, descriptor: int) -> None:
    """Remove a folder that this process has locked, also where it is told to end meanwhile: it is, afterwards."""
    interrupt: KeyboardInterrupt | None = None
    removed = False
    while not removed:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            removed = True
        except KeyboardInterrupt as error:
            interrupt = error
    os.close(descriptor)
    if interrupt is not None:
        raise interrupt


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary folders whose process is gone; what had stepped aside goes back where nothing replaced it."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            # Somebody else's, or removed meanwhile.
            continue
        try:
            if _lock(descriptor, wait=False):
                replaced, target = left / _REPLACED, folder / left.name.removeprefix(_TEMPORARY).rpartition(".")[0]
                if replaced.exists() and not target.exists():
                    replaced.rename(target)
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; the kernel lets go of it when a process dies.

    False where another holds it, or the file system knows no locks: then nothing is taken for abandoned.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
