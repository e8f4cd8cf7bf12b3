"""Where tasks put the files of parts: a folder that all machines share, or a store.

A task may be killed at any moment, run again, and run twice at once. So it makes its files in a folder of its own and
puts them in their place whole. Two runs of one task make the same bytes: which of them comes last does not matter.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lazydp.components.ingest.stored import Place
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_DIRECTORY, scratch_directory


class PartSink(Protocol):
    """Takes the files of parts; may be sent to other machines."""

    def check(self) -> None:
        """Check that this machine can put files there.

        Raises:
            InputError: it cannot.
        """

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A private folder to make files in, which is gone afterwards."""

    def put(self, folder: Path, part: str) -> None:
        """Put the files of a folder into their place.

        Args:
            folder: in the scratch folder.
            part: the folder of the dataset that they belong to.
        """


@dataclass(frozen=True)
class SharedFolder:
    """The unfinished dataset as a folder, which all machines see under one path.

    folder: of the dataset.
    scratch_name: a folder in it, which is removed at the end whatever is left there.
    """

    folder: Path
    scratch_name: str

    def check(self) -> None:
        if not (self.folder / self.scratch_name).is_dir():
            raise InputError(
                f"{socket.gethostname()} does not see {self.folder.parent}, where the dataset is made: with workers on "
                "other machines, name a folder that all of them share, or a store, such as s3://bucket/folder"
            )

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        made = Path(tempfile.mkdtemp(dir=self.folder / self.scratch_name))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def put(self, folder: Path, part: str) -> None:
        target = self.folder / part
        target.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
        for file in sorted(folder.iterdir()):
            file.replace(target / file.name)


@dataclass(frozen=True)
class StoredFolder:
    """The unfinished dataset in a store."""

    place: Place

    def check(self) -> None:
        """Whoever can read the store's address can try: a refusal is told by the first task that writes."""

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with scratch_directory("part") as folder:
            yield folder

    def put(self, folder: Path, part: str) -> None:
        self.place.put(folder, under=part)
