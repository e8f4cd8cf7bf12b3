"""A copy of a bundle that nobody else can change, so that what is served is what was checked."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lazydp.components.bundle import inventory
from lazydp.components.bundle.manifest import FILE_NAME, MAX_SIGNATURE_BYTES, SIGNATURE_FILE, BundleManifest, plain_file
from lazydp.components.shared.errors import IntegrityError, UnavailableError

_AT_ONCE = 2**30


@contextlib.contextmanager
def private_copy(bundle: Path, parent: Path | None) -> Iterator[Path]:
    """Copy `bundle`; the copy is gone from its folder at the end, and stays for as long as something has it mapped.

    A file that is mapped and cut short in place kills whoever reads it (SIGBUS), and one that is overwritten changes
    the answers; a hard link would not help, since it is the same file.

    Args:
        bundle: the folder.
        parent: where the copy lies; None for the system's folder of temporary files.

    Yields:
        The folder of the copy.

    Raises:
        LazyDPError: it is no bundle, its files are not those of its manifest, or there is no room.
    """
    folder = bundle.resolve()
    manifest = BundleManifest.load(folder)
    inventory.check(folder, manifest.files, digests=False)
    try:
        copy = Path(tempfile.mkdtemp(prefix="lazydp-serve-", dir=parent))
    except OSError as error:
        raise _no_room(parent, error.strerror) from None
    try:
        _refuse_where_full(copy, sum(entry.size for entry in manifest.files))
        signature = plain_file(folder / SIGNATURE_FILE, what="signature", max_bytes=MAX_SIGNATURE_BYTES)
        own = [FILE_NAME, *([SIGNATURE_FILE] if signature.exists() else [])]
        for name, size in [*((name, None) for name in own), *((entry.path, entry.size) for entry in manifest.files)]:
            _copy_file(folder / name, copy / name, size)
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _refuse_where_full(copy: Path, needed: int) -> None:
    free = shutil.disk_usage(copy).free
    if free < needed:
        raise _no_room(copy.parent, f"{needed} bytes are needed, {free} are free")


def _copy_file(source: Path, target: Path, size: int | None) -> None:
    """Copy a plain file, by sharing its blocks where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise IntegrityError(f"bundle {source.parent}: {source.name} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(read)
        if not stat.S_ISREG(status.st_mode) or size not in (None, status.st_size):
            raise IntegrityError(f"bundle {source.parent}: {source.name} changed while it was copied")
        with target.open("wb") as written:
            _copy_bytes(read, written.fileno())
    except OSError as error:
        raise _no_room(target.parent, error.strerror) from None
    finally:
        os.close(read)


def _copy_bytes(read: int, written: int) -> None:
    try:
        while os.copy_file_range(read, written, _AT_ONCE):
            pass
    except OSError:
        # Not every pair of file systems can; what was copied so far is copied again.
        os.lseek(read, 0, os.SEEK_SET)
        os.lseek(written, 0, os.SEEK_SET)
        os.ftruncate(written, 0)
        with os.fdopen(os.dup(read), "rb") as source, os.fdopen(os.dup(written), "wb") as target:
            shutil.copyfileobj(source, target, 2**20)


def _no_room(parent: Path | None, reason: str | None) -> UnavailableError:
    where = parent or Path(tempfile.gettempdir())
    return UnavailableError(
        f"a private copy of the bundle cannot be made in {where} ({reason}): set copy_folder to a folder with room, or "
        "copy_bundles to false where nobody can change the bundle in place"
    )
