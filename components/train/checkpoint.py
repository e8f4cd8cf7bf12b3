"""Checkpoints: the private state of a run, whole or absent, from which it goes on to the same bits.

    RUN/                            mode 0700
      run.json                      which run this is: its id, configuration, dataset and code version
      lock                          held while a process trains or exports
      checkpoints/step-000000500/
        checkpoint.json             which run it is of, step, scalars of the state, DpEvent so far, sha256 of the files
        state.safetensors           tables as they are (noise still pending), `last`, dense layers, optimizers
        noise.key                   32 bytes; who has them can subtract the noise

Everything is mode 0600, is written under a temporary name, synced and renamed. The two latest are kept; a torn or
altered one is passed over with a line in the log, and one of another run is refused. At export the keys are overwritten
and removed: what is left can be looked at, and cannot be resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from lazydp.components.budget.accounting.tuning import Tuning
from lazydp.components.shared.errors import FormatError, InputError, IntegrityError, LazyDPError
from lazydp.components.shared.files import (
    PRIVATE_DIRECTORY,
    PRIVATE_FILE,
    atomic_directory,
    read_json,
    sha256_file,
    sync_directory,
    write_json,
)
from lazydp.components.train.config import TrainConfig
from lazydp.kernels.noise_key import NoiseKey

if TYPE_CHECKING:
    from dp_accounting import DpEvent

FORMAT_VERSION = 1
_CHECKPOINT_VERSION = 2  # 2: says which run it is of
KEPT = 2
_STATE, _KEY, _DOCUMENT = "state.safetensors", "noise.key", "checkpoint.json"
_KEY_BYTES = 32
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_log = logging.getLogger("lazydp.train")


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Which run it is.

    Attributes:
        run_id: names the run in the ledger; kept over every restart.
        config: the settings it was started with.
        dataset_fingerprint: what it is trained on.
        code_version: the lazydp that started it, sources included (`shared.version`).
        noise_multiplier: sigma, as configured or as calibrated when the run began; None without privacy.
        tuning: the sweep that the run is a trial of; all trials of a sweep share its run id.
        selected: whether the sweep is over and kept this trial; no other trial may be released.
    """

    run_id: str
    config: TrainConfig
    dataset_fingerprint: str
    code_version: str
    noise_multiplier: float | None
    tuning: Tuning | None = None
    selected: bool = False

    def dp_event(self, max_examples_per_user: int | None, *, steps: int | None = None) -> DpEvent:
        """What the run, or its first `steps` steps, is to the accountant."""
        return self.config.dp_event(max_examples_per_user, noise_multiplier=self.noise_multiplier, steps=steps)

    def training_event(self, max_examples_per_user: int | None, *, steps: int | None = None) -> DpEvent:
        """The part of `dp_event` that the sampler draws for: training without the counts."""
        return self.config.training_event(max_examples_per_user, noise_multiplier=self.noise_multiplier, steps=steps)

    def released_event(self, event: DpEvent) -> DpEvent:
        """What a release costs whose run is `event`: that, or the whole sweep that selected the run."""
        return event if self.tuning is None else self.tuning.event(event)

    def differences(self, other: RunIdentity) -> list[str]:
        """`what: other's != ours` for everything in which `other` could not go on with this run."""
        found = other.config.differences(self.config)
        for what, theirs, ours in (
            ("dataset", other.dataset_fingerprint, self.dataset_fingerprint),
            ("run id", other.run_id, self.run_id),
            ("lazydp version", other.code_version, self.code_version),
            ("sweep", other.tuning, self.tuning),
        ):
            if theirs != ours:
                found.append(_difference(what, theirs, ours))
        return found

    def marks(self) -> dict[str, Any]:
        """What a checkpoint of the run says of itself; private, for it holds the dataset's fingerprint."""
        return {
            "run id": self.run_id,
            "configuration": self.config.digest(),
            "dataset": self.dataset_fingerprint,
            "noise_multiplier": self.noise_multiplier,
            "lazydp version": self.code_version,
        }

    def to_json(self) -> dict[str, Any]:
        """As stored in run.json."""
        return {
            "run_id": self.run_id,
            "config": self.config.model_dump(mode="json"),
            "config_digest": self.config.digest(),
            "dataset_fingerprint": self.dataset_fingerprint,
            "code_version": self.code_version,
            "noise_multiplier": self.noise_multiplier,
            "tuning": None if self.tuning is None else self.tuning.model_dump(mode="json"),
            "selected": self.selected,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any], *, where: Path) -> RunIdentity:
        """The reverse of `to_json`.

        Raises:
            FormatError: a field is missing.
        """
        try:
            return cls(
                run_id=document["run_id"],
                config=TrainConfig.parse(document["config"], where=str(where)),
                dataset_fingerprint=document["dataset_fingerprint"],
                code_version=document["code_version"],
                noise_multiplier=document["noise_multiplier"],
                tuning=None if document.get("tuning") is None else Tuning.model_validate(document["tuning"]),
                selected=document.get("selected", False),
            )
        except KeyError as error:
            raise FormatError(f"run {where} lacks {error}: it was not written whole") from error
        except ValidationError as error:
            raise FormatError(f"run {where} names a sweep that is none: {error.errors()[0]['msg']}") from error


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after a step.

    Attributes:
        step: the last step that it contains (0: initial weights).
        state: nested dicts and lists of tensors and scalars.
        event: the DpEvent so far as JSON, or None for a run without privacy.
        key: the noise key; None once it is destroyed.
    """

    step: int
    state: dict[str, Any]
    event: dict[str, Any] | None
    key: NoiseKey | None


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
            path.mkdir(parents=True, exist_ok=True, mode=PRIVATE_DIRECTORY)
        if not path.is_dir():
            raise InputError(f"no run at {path}: give the folder that `lazydp train --out` wrote")
        path.chmod(PRIVATE_DIRECTORY)
        with _lock(path / "lock"):
            folder = cls(path)
            folder._sweep()
            yield folder

    def identity(self) -> RunIdentity | None:
        """The run that the folder holds, or None."""
        file = self.path / "run.json"
        if not file.exists():
            return None
        return RunIdentity.from_json(read_json(file, format_version=FORMAT_VERSION, what="run"), where=file)

    def begin(self, identity: RunIdentity) -> None:
        """Make the folder this run's."""
        write_json(self.path / "run.json", identity.to_json(), format_version=FORMAT_VERSION, mode=PRIVATE_FILE)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, whole or not at all, and drop all but the latest two."""
        self._checkpoints.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
        target = self._checkpoints / f"step-{checkpoint.step:09d}"
        if target.exists() and not (target / _DOCUMENT).exists():
            _remove(target)  # damaged, and passed over when the run was resumed
        with atomic_directory(target, mode=PRIVATE_DIRECTORY, replaces=_DOCUMENT) as folder:
            tree, tensors = _split(checkpoint.state)
            document = {
                "run": self._marks(),
                "step": checkpoint.step,
                "state": tree,
                "dp_event": checkpoint.event,
                "test_key": checkpoint.key is not None and checkpoint.key.is_test,
                "sha256": {_STATE: write_tensors(folder / _STATE, tensors)},
            }
            if checkpoint.key is not None:
                document["sha256"] |= {_KEY: _write_private(folder / _KEY, checkpoint.key.to_bytes())}
            document["sha256"] |= {_DOCUMENT: _digest(document)}
            write_json(folder / _DOCUMENT, document, format_version=_CHECKPOINT_VERSION, mode=PRIVATE_FILE)
        for old in self._steps()[:-KEPT]:
            _remove(old)

    def latest(self) -> Checkpoint | None:
        """The latest whole checkpoint; torn ones are passed over with a line in the log.

        Raises:
            IntegrityError: there are checkpoints, and none of them is whole, or the latest whole one is another run's.
        """
        problems = []
        for folder in reversed(self._steps()):
            try:
                found, marks = _load(folder)
            except (LazyDPError, OSError) as error:
                problems.append(str(error))
                _log.warning("passing over a damaged checkpoint: %s", error)
            else:
                self._check_own(folder, marks)
                return found
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
            differences = "; ".join(_difference(name, marks.get(name), ours.get(name)) for name in names)
            raise IntegrityError(
                f"checkpoint {folder} is of another run than {self.path / 'run.json'} (its own != the run's): "
                f"{differences}. Bring back the folder as the run left it, or train a new run into another one"
            )

    def has_checkpoint(self) -> bool:
        """Whether training began."""
        return bool(self._steps())

    def destroy_keys(self) -> None:
        """Overwrite and remove the noise key of every checkpoint.

        Overwriting reaches the blocks of a plain file system; copies that a snapshotting one or a flash disk keeps
        are out of reach, which is why a run's folder belongs on an encrypted volume.
        """
        self._sweep()
        for folder in self._steps():
            _destroy(folder / _KEY)

    def erase(self) -> None:
        """Destroy the keys, then remove everything."""
        self.destroy_keys()
        shutil.rmtree(self.path)

    def key_destroyed(self) -> bool:
        """Whether the run was exported, so that nothing can be resumed."""
        steps = self._steps()
        return bool(steps) and not any((folder / _KEY).exists() for folder in steps)

    def _steps(self) -> list[Path]:
        return sorted(self._checkpoints.glob("step-*")) if self._checkpoints.is_dir() else []

    def _sweep(self) -> None:
        """Remove what a killed process left under temporary names: it may hold a key."""
        if self._checkpoints.is_dir():
            for leftover in self._checkpoints.glob(".*"):
                _remove(leftover)
        for leftover in self.path.glob(".run.json.*"):
            leftover.unlink()


class BackgroundWriter:
    """Writes checkpoints beside training: the state is copied (into host memory) at once, the disk is waited for later.

    One write is under way at most. An error of the write is raised by the next `save`, or when the block is left.

    Args:
        folder: where to.
        memory_limit: a state larger than this (bytes) is written at once instead of copied.
    """

    def __init__(self, folder: RunFolder, *, memory_limit: int) -> None:
        self._folder = folder
        self._memory_limit = memory_limit
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(self, checkpoint: Checkpoint) -> None:
        """Take the state as it is now."""
        self.close()
        if _tensor_bytes(checkpoint.state) > self._memory_limit:
            self._folder.save(checkpoint)
            return
        snapshot = replace(checkpoint, state=_copy(checkpoint.state))
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=False)
        self._thread.start()

    def close(self) -> None:
        """Wait for the write under way, and raise its error if it had one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self._folder.save(checkpoint)
        except BaseException as error:
            self._error = error


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write a private safetensors file without a copy of the tensors in memory; returns its SHA-256.

    (safetensors' own `save_file` serialises through a copy, which a table of half the memory cannot afford.)
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with _open_private(path) as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
                file.write(data)
                digest.update(data)
    return digest.hexdigest()


def _difference(what: str, theirs: Any, ours: Any) -> str:
    """`what: theirs != ours`; of a dataset no fingerprint, for more people read messages than may read the data."""
    return "dataset: its content is another" if what == "dataset" else f"{what}: {theirs!r} != {ours!r}"


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


def _open_private(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE), "wb")


def _write_private(path: Path, data: bytes) -> str:
    with _open_private(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def _destroy(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    sync_directory(path.parent)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, its key first."""
    for key in [*folder.glob(_KEY), *folder.glob(f"*/{_KEY}")]:
        _destroy(key)
    shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def _load(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """A whole checkpoint, and what it says of the run that wrote it (nothing, where an older lazydp wrote it)."""
    document = read_json(folder / _DOCUMENT, format_version=_CHECKPOINT_VERSION, what="checkpoint")
    digests = document.get("sha256", {})
    if digests.pop(_DOCUMENT, None) != _digest(document):
        raise IntegrityError(f"{folder / _DOCUMENT} differs from its digest")
    for name, expected in digests.items():
        if name == _KEY and not (folder / name).exists():
            continue  # destroyed at export
        if sha256_file(folder / name) != expected:
            raise IntegrityError(f"{folder / name} differs from its digest")
    key = None
    if (folder / _KEY).exists():
        key = NoiseKey.from_bytes((folder / _KEY).read_bytes(), is_test=document["test_key"])
    try:
        tensors = load_file(folder / _STATE)
    except SafetensorError as error:
        raise FormatError(f"{folder / _STATE} cannot be read: {error}") from error
    state = _join(document["state"], tensors)
    found = Checkpoint(step=document["step"], state=state, event=document["dp_event"], key=key)
    return found, document.get("run", {})


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _split(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A JSON tree with the tensors named, and the tensors."""
    tensors: dict[str, torch.Tensor] = {}

    def visit(node: Any, name: str) -> Any:
        if isinstance(node, torch.Tensor):
            tensors[name] = node
            return {"tensor": name}
        if isinstance(node, dict):  # as pairs: optimizers key their state by integers
            return {"dict": [[key, visit(value, f"{name}/{key}")] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {"list": [visit(value, f"{name}/{index}") for index, value in enumerate(node)]}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"{name}: a checkpoint holds tensors and scalars, found {type(node).__name__}")

    return visit(state, "state"), tensors


def _join(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "list" in node:
        return [_join(value, tensors) for value in node["list"]]
    return {key: _join(value, tensors) for key, value in node["dict"]}


def _copy(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_copy(value) for value in node]
    return node


def _tensor_bytes(node: Any) -> int:
    if isinstance(node, torch.Tensor):
        return node.numel() * node.element_size()
    if isinstance(node, dict):
        return sum(_tensor_bytes(value) for value in node.values())
    if isinstance(node, list | tuple):
        return sum(_tensor_bytes(value) for value in node)
    return 0
