"""The folder of one run: which run it is, its checkpoints, and the lock that one process holds.

    RUN/                            mode 0700
      run.json                      which run this is: its id, configuration, dataset and code version
      root.key                      the key that the run's reservation is bound to; of a trial, its sweep's
      lock                          held while a process trains or exports
      checkpoints/step-000000500/   see `checkpoint`

The two latest checkpoints are kept; a torn or altered one is passed over with a line in the log, and one of another run
is refused. At export the keys are overwritten and removed: what is left can be looked at, and cannot be resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lazydp.components.shared.errors import InputError, IntegrityError, LazyDPError
from lazydp.components.shared.files import (
    PRIVATE_DIRECTORY,
    PRIVATE_FILE,
    read_json,
    require_local,
    write_bytes,
    write_json,
)
from lazydp.components.shared.secrecy import forbid_core_dumps
from lazydp.components.train.ranks.ranks import Alone
from lazydp.components.train.run.checkpoint import (
    Checkpoint,
    destroy_file,
    destroy_key,
    has_key,
    read_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from lazydp.components.train.run.identity import RunIdentity, difference
from lazydp.components.train.run.shards import Shards
from lazydp.kernels.noise_key import KEY_BYTES, NoiseKey

FORMAT_VERSION = 1
_ROOT_KEY = "root.key"
_SECRET, _TEST = b"\x00", b"\x01"  # after the key's bytes: whether it was made for a test
KEPT = 2
"""Checkpoints that are kept: the latest, and one before it in case that is damaged."""

_log = logging.getLogger("lazydp.train")


class RunFolder:
    """The folder of one run; opened under a lock, so that two processes never train or export the same run.

    Use `RunFolder.locked(path)`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = path / "checkpoints"

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path, *, create: bool = False) -> Iterator[RunFolder]:
        """Hold the run's folder.

        Raises:
            InputError: there is none (and not `create`), or another process holds it.
        """
        if create:
            require_local(path)
            path.mkdir(parents=True, exist_ok=True, mode=PRIVATE_DIRECTORY)
        if not path.is_dir():
            raise InputError(f"no run at {path}: give the folder that `lazydp train --out` wrote")
        path.chmod(PRIVATE_DIRECTORY)
        forbid_core_dumps()  # from here on the process may hold the run's key
        with _lock(path / "lock"):
            folder = cls(path)
            folder._sweep()
            yield folder

    @classmethod
    def followed(cls, path: Path) -> RunFolder:
        """The folder of a run whose rank 0 holds it: for another rank, which reads it and writes its rows.

        Raises:
            InputError: it is not here.
        """
        if not (path / "run.json").is_file():
            raise InputError(
                f"no run at {path}, which rank 0 of this run has opened: --out is a folder that all ranks share"
            )
        forbid_core_dumps()
        return cls(path)

    def identity(self) -> RunIdentity | None:
        """The run that the folder holds, or None."""
        file = self.path / "run.json"
        if not file.exists():
            return None
        return RunIdentity.from_json(read_json(file, format_version=FORMAT_VERSION, what="run"), where=file)

    def begin(self, identity: RunIdentity) -> None:
        """Make the folder this run's."""
        write_json(self.path / "run.json", identity.to_json(), format_version=FORMAT_VERSION, mode=PRIVATE_FILE)

    def root_key(self) -> NoiseKey | None:
        """The key that the run's reservation is bound to; None before `keep_root_key`, and after the export."""
        file = self.path / _ROOT_KEY
        if not file.exists():
            return None
        found = file.read_bytes()
        if len(found) != KEY_BYTES + 1:
            raise IntegrityError(f"{file} is damaged: expected {KEY_BYTES + 1} bytes, found {len(found)}")
        return NoiseKey.from_bytes(found[:KEY_BYTES], is_test=found[KEY_BYTES:] == _TEST)

    def keep_root_key(self, key: NoiseKey) -> None:
        """Keep the key before anything is promised to it: a run that is killed goes on under the same one."""
        if not (self.path / _ROOT_KEY).exists():
            content = key.to_bytes() + (_TEST if key.is_test else _SECRET)
            write_bytes(self.path / _ROOT_KEY, content, mode=PRIVATE_FILE)

    def save(self, checkpoint: Checkpoint, shards: Shards | None = None) -> None:
        """Write a checkpoint, whole or not at all, and drop all but the latest two.

        Args:
            checkpoint: what to write.
            shards: of a run that several ranks may train, each of which calls this.
        """
        self._checkpoints.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
        target = self._checkpoints / f"step-{checkpoint.step:09d}"
        write_checkpoint(target, checkpoint, marks=self._marks(), shards=shards)
        if shards is None or not shards.ranks.rank:
            for old in self._steps()[:-KEPT]:
                remove_checkpoint(old)

    def latest(self, shards: Shards | None = None) -> Checkpoint | None:
        """The latest whole checkpoint; torn ones are passed over with a line in the log.

        Args:
            shards: of a run that several ranks may train. Each rank calls this, and gets its own rows of one that is
                whole for all of them.

        Raises:
            IntegrityError: there are checkpoints, and none of them is whole, or the latest whole one is another run's.
        """
        problems = []
        ranks = Alone() if shards is None else shards.ranks
        names = None if ranks.rank else {"steps": [folder.name for folder in reversed(self._steps())]}
        for name in ranks.tell(names)["steps"]:
            folder = self._checkpoints / name
            problem, found = "", None
            marks: dict[str, Any] = {}
            try:
                found, marks = read_checkpoint(folder, None if shards is None else shards.places())
            except (LazyDPError, OSError) as error:
                problem = str(error)
                _log.warning("passing over a damaged checkpoint: %s", error)
            answers = ranks.gather(torch.tensor([int(found is None)]), purpose="checkpoint")
            damaged = [rank for rank, answer in enumerate(answers) if bool(answer)]
            if not damaged:
                self._check_own(folder, marks)
                return found
            problems.append(problem or f"{folder} is damaged, says rank {damaged[0]}")
        if problems:
            raise IntegrityError(f"no checkpoint of {self.path} is whole: {'; '.join(problems)}")
        return None

    def _marks(self) -> dict[str, Any]:
        identity = self.identity()
        return {} if identity is None else identity.marks()

    def _check_own(self, folder: Path, marks: dict[str, Any]) -> None:
        """Refuse what another run wrote, however well its shapes fit: it has another key, and another charge."""
        ours = self._marks()
        names = [name for name in ours | marks if marks.get(name) != ours.get(name)]
        if names:
            differences = "; ".join(difference(name, marks.get(name), ours.get(name)) for name in names)
            raise IntegrityError(
                f"checkpoint {folder} is of another run than {self.path / 'run.json'} (its own != the run's): "
                f"{differences}. Bring back the folder as the run left it, or train a new run into another one"
            )

    def has_checkpoint(self) -> bool:
        """Whether training began."""
        return bool(self._steps())

    def destroy_keys(self) -> None:
        """Overwrite and remove the noise key of the run and of every checkpoint.

        Overwriting reaches the blocks of a plain file system; copies that a snapshotting one or a flash disk keeps
        are out of reach, which is why a run's folder belongs on an encrypted volume.
        """
        self._sweep()
        for folder in self._steps():
            destroy_key(folder)
        destroy_file(self.path / _ROOT_KEY)

    def erase(self) -> None:
        """Destroy the keys, then remove everything."""
        self.destroy_keys()
        shutil.rmtree(self.path)

    def key_destroyed(self) -> bool:
        """Whether the run was exported, so that nothing can be resumed."""
        steps = self._steps()
        return bool(steps) and not any(has_key(folder) for folder in steps)

    def _steps(self) -> list[Path]:
        return sorted(self._checkpoints.glob("step-*")) if self._checkpoints.is_dir() else []

    def _sweep(self) -> None:
        """Remove what a killed process left under temporary names: it may hold a key."""
        if self._checkpoints.is_dir():
            for leftover in self._checkpoints.glob(".*"):
                remove_checkpoint(leftover)
        for leftover in self.path.glob(".run.json.*"):
            leftover.unlink()
        for leftover in self.path.glob(f".{_ROOT_KEY}.*"):
            destroy_file(leftover)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path.parent} is in use: another process trains or exports this run") from None
        yield
    finally:
        os.close(descriptor)
