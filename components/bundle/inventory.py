"""The inventory of a bundle's folder: every file is there, plain, of the stated size and digest, and nothing else."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from lazydp.components.bundle.manifest import FILE_NAME, SIGNATURE_FILE, FileEntry
from lazydp.components.shared.errors import FormatError, IntegrityError
from lazydp.components.shared.files import sha256_file

# What vouches for the other files, and is not listed among them.
_UNLISTED = (FILE_NAME, SIGNATURE_FILE)


def _members(folder: Path) -> Iterator[Path]:
    """Everything below `folder` that is not a plain directory; links are not followed."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            yield from _members(entry)
        else:
            yield entry


def take(folder: Path) -> tuple[FileEntry, ...]:
    """List every file of `folder` but the manifest and its signature, with size and digest."""
    return tuple(
        FileEntry(path=path.relative_to(folder).as_posix(), sha256=sha256_file(path), size=path.stat().st_size)
        for path in _members(folder)
        if path.relative_to(folder).as_posix() not in _UNLISTED
    )


def check(folder: Path, entries: Iterable[FileEntry], *, digests: bool) -> None:
    """Compare `folder` with its manifest.

    Args:
        folder: the bundle.
        entries: what the manifest lists.
        digests: whether to read every byte; sizes and names are always compared.

    Raises:
        FormatError: a member is a link or something else than a plain file.
        IntegrityError: a file is missing, extra, or differs in size or digest.
    """
    expected = {entry.path: entry for entry in entries}
    found = set()
    for path in _members(folder):
        name = path.relative_to(folder).as_posix()
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise FormatError(f"bundle {folder}: {name} is a symbolic link; a bundle holds plain files only")
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"bundle {folder}: {name} is not a plain file")
        if name in _UNLISTED:
            continue
        found.add(name)
        entry = expected.get(name)
        if entry is None:
            raise IntegrityError(f"bundle {folder}: {name} is not in the manifest; remove it or export again")
        if status.st_size != entry.size:
            raise IntegrityError(
                f"bundle {folder}: {name} has {status.st_size} bytes, the manifest says {entry.size}; copy it again"
            )
    missing = sorted(expected.keys() - found)
    if missing:
        raise IntegrityError(f"bundle {folder}: {missing[0]} is missing; copy the bundle again")
    if digests:
        for name, entry in expected.items():
            if sha256_file(folder / name) != entry.sha256:
                raise IntegrityError(
                    f"bundle {folder}: {name} is corrupted, its SHA-256 is not the manifest's; copy it again"
                )
