"""A dataset in an object store: complete with its last object, and copied to this machine to be read.

Objects cannot be renamed together, as a folder can. So a dataset there is what has a `dataset.json`, which is written
last and deleted first. An object `.unfinished` is written before any other and deleted after all: where it lies beside
no `dataset.json`, an ingest was ended, and the next one into the same place deletes what that one left.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from lazydp.components.ingest.locations import is_uri, open_location, shown, unreadable
from lazydp.components.ingest.manifest import MANIFEST, read_manifest
from lazydp.components.ingest.workers import in_order
from lazydp.components.shared.errors import FormatError, InputError, LazyDPError
from lazydp.components.shared.files import (
    PRIVATE_DIRECTORY,
    PRIVATE_FILE,
    atomic_directory,
    scratch_directory,
)

UNFINISHED = ".unfinished"
# What ingest writes. Nothing else is ever deleted.
_OURS = re.compile(
    r"(part-[0-9]{3}/)?(train|test|users|rows)\.arrow|(items|ranges)\.arrow|vocab/[^/]+|dataset\.json|\.unfinished"
)
# A store answers slowly, and answers many at once.
_AT_ONCE = 8
_COPIED_BYTES = 4 << 20
_log = logging.getLogger("lazydp.ingest")


@contextlib.contextmanager
def dataset_folder(out: str | Path, *, replace: bool) -> Iterator[Path]:
    """Yield a folder to write a dataset into, which becomes `out` as a whole when the block ends well.

    Args:
        out: a folder of this machine, or a URI of a store; for that the dataset is made in a private folder under the
            system's temporary one, then uploaded.
        replace: whether a dataset that is there is replaced.

    Raises:
        InputError: something is there, and it is no dataset or is not to be replaced.
        UnavailableError: the store does not answer, or refuses.
    """
    if not is_uri(str(out)):
        with atomic_directory(Path(out), mode=PRIVATE_DIRECTORY, replaces=MANIFEST if replace else None) as folder:
            yield folder
        return
    store = Place.open(str(out))
    store.make_room(replace=replace)
    with scratch_directory("dataset") as folder:
        yield folder
        store.upload(folder)


@contextlib.contextmanager
def dataset_of_parts(out: str, *, replace: bool) -> Iterator[tuple[Path, Place]]:
    """As `dataset_folder` for a URI, where others write the files of parts into the store meanwhile.

    What is to be replaced is deleted first. When the block ends well, the files of the folder are written as well.

    Yields:
        A private folder of this machine, and the place in the store.
    """
    place = Place.open(out)
    place.make_room(replace=replace)
    with scratch_directory("dataset") as folder, place.unfinished():
        yield folder, place
        place.put(folder)


@contextlib.contextmanager
def dataset_here(dataset: str | Path) -> Iterator[Path]:
    """A dataset as a folder of this machine: itself, or for a URI a private copy that is gone afterwards.

    Raises:
        FormatError: no complete dataset is there.
        UnavailableError: the store does not answer.
    """
    if not is_uri(str(dataset)):
        yield Path(dataset)
        return
    store = Place.open(str(dataset))
    with scratch_directory("dataset") as folder:
        store.download(folder)
        yield folder


@contextlib.contextmanager
def manifest_here(dataset: str) -> Iterator[Path]:
    """The manifest of a dataset in a store as a file of this machine; raises as `dataset_here`."""
    with scratch_directory("manifest") as folder:
        Place.open(dataset).download_manifest(folder)
        yield folder / MANIFEST


@dataclass(frozen=True)
class Place:
    """A folder of a store; may be sent to another machine."""

    filesystem: Any
    path: str
    where: str

    @classmethod
    def open(cls, location: str) -> Place:
        if location.startswith("file://"):
            raise InputError(f"{location}: name a folder of this machine by its path")
        filesystem, path = open_location(location)
        return cls(filesystem, path.rstrip("/"), shown(location))

    def make_room(self, *, replace: bool) -> None:
        """Check that a dataset can be written, and delete what an ingest that was ended left."""
        with self._answering():
            names = self._names()
            foreign = [name for name in names if not _OURS.fullmatch(name)]
            if foreign:
                raise InputError(f"{self.where} holds {foreign[0]}, which is of no dataset: choose another place")
            if MANIFEST in names:
                if not replace:
                    raise InputError(f"{self.where} holds a dataset: choose another place, or replace it by --replace")
            elif UNFINISHED in names:
                _log.info("%s: deleting what an ingest that was ended left", self.where)
                self._delete(names)
            elif names:
                raise InputError(f"{self.where} holds {names[0]} and no {MANIFEST}: delete it, or choose another place")

    def upload(self, folder: Path) -> None:
        """Write the files of a dataset, the manifest after all others; nothing stays where that fails."""
        with self.unfinished():
            self.put(folder)

    @contextlib.contextmanager
    def unfinished(self) -> Iterator[None]:
        """What is here is no dataset while the block runs; nothing stays where it fails."""
        with self._answering():
            old = self._names()
            self._write(UNFINISHED, b"")
        try:
            with self._answering():
                self._delete([name for name in old if name != UNFINISHED])
            yield
            with self._answering():
                self._delete([UNFINISHED])
        except BaseException:
            # Where the store does not answer either, the next ingest into this place deletes it.
            with contextlib.suppress(OSError):
                self._delete([name for name in self._names() if _OURS.fullmatch(name)])
            raise

    def put(self, folder: Path, *, under: str = ".") -> None:
        """Write the files of a folder, a manifest after all others.

        Args:
            folder: of this machine.
            under: the folder of the dataset that they belong to.
        """
        within = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        first = "" if under == "." else f"{under}/"
        with self._answering():
            self._copy_all(lambda name: self._put(folder / name, first + name), [n for n in within if n != MANIFEST])
            if MANIFEST in within:
                self._put(folder / MANIFEST, first + MANIFEST)

    def download_manifest(self, folder: Path) -> None:
        """Copy the manifest."""
        with self._answering():
            try:
                self._get(folder, MANIFEST)
            except FileNotFoundError:
                raise FormatError(f"no dataset at {self.where}: it holds no {MANIFEST}") from None

    def download(self, folder: Path) -> None:
        """Copy the manifest and the files that it names; whoever opens the dataset compares their digests."""
        self.download_manifest(folder)
        with self._answering():
            try:
                names = list(read_manifest(folder).files)
                foreign = [name for name in names if not _OURS.fullmatch(name)]
                if foreign:
                    raise FormatError(f"the dataset {self.where} names a file {foreign[0]}, which no dataset has")
                self._copy_all(lambda name: self._get(folder, name), names)
            except FileNotFoundError as error:
                raise FormatError(f"the dataset {self.where} is torn: {error}; run ingest again") from None

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except LazyDPError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.where, error, filesystem=self.filesystem) from None

    def _names(self) -> list[str]:
        listed = self.filesystem.get_file_info(pafs.FileSelector(self.path, recursive=True, allow_not_found=True))
        found = [info.path[len(self.path) :].lstrip("/") for info in listed if info.type == pafs.FileType.File]
        # A store without folders may keep an empty object in the place of one.
        return sorted(name for name in found if name and not name.endswith("/"))

    def _delete(self, names: Sequence[str]) -> None:
        """The manifest first: what remains without it is no dataset. The mark of the unfinished last."""
        for name in sorted(names, key=lambda name: (name == UNFINISHED, name != MANIFEST)):
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(f"{self.path}/{name}")

    def _copy_all(self, copy: Any, names: Sequence[str]) -> None:
        for _ in in_order(copy, names, workers=_AT_ONCE):
            pass

    def _write(self, name: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(content)

    def _put(self, file: Path, name: str) -> None:
        with file.open("rb") as source, self.filesystem.open_output_stream(f"{self.path}/{name}") as sink:
            while block := source.read(_COPIED_BYTES):
                sink.write(block)

    def _get(self, folder: Path, name: str) -> None:
        (folder / name).parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as source, (folder / name).open("wb") as sink:
            shutil.copyfileobj(source, sink, _COPIED_BYTES)
        (folder / name).chmod(PRIVATE_FILE)
