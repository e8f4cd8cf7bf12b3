"""Checkpoints: the private state of a run, whole or absent, from which it goes on to the same bits.

    step-000000500/               mode 0700
      checkpoint.json             which run it is of, step, scalars of the state, DpEvent so far, sha256 of the files
      state.safetensors           tables as they are (noise still pending), `last`, dense layers, optimizers
      noise.key                   32 bytes; who has them can subtract the noise

A run of several ranks has its tables in a file for each rank, see `shards`.

Everything is mode 0600, is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lazydp.components.shared.errors import FormatError, IntegrityError
from lazydp.components.shared.files import (
    PRIVATE_DIRECTORY,
    PRIVATE_FILE,
    atomic_directory,
    read_json,
    sha256_file,
    sync_directory,
    write_json,
)
from lazydp.components.train.run.shards import ROWS, Shards, read_rows
from lazydp.kernels.noise_key import NoiseKey

_CHECKPOINT_VERSION = 3  # 2: says which run it is of. 3: rows lie in files of several ranks
_UNSHARDED_VERSION = 2
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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after a step.

    Attributes:
        step: the last step that it contains (0: initial weights).
        state: nested dicts and lists of tensors and scalars.
        event: the DpEvent so far as JSON, or None for a run without privacy.
        key: the noise key; None once it is destroyed.
        processor: on which the sums were rounded (`device.processor`); None for what an older lazydp wrote.
    """

    step: int
    state: dict[str, Any]
    event: dict[str, Any] | None
    key: NoiseKey | None
    processor: str | None = None


def write_checkpoint(
    target: Path, checkpoint: Checkpoint, *, marks: dict[str, Any], shards: Shards | None = None
) -> None:
    """Write a checkpoint as the folder `target`, whole or not at all.

    Args:
        target: the folder; a damaged checkpoint that stands there is replaced.
        checkpoint: what to write.
        marks: which run it is of.
        shards: of a run that several ranks may train. Each rank calls this; `checkpoint` has the rows of that rank.

    Raises:
        UnavailableError: a rank could not write its rows.
        PrivacyError: another attempt holds the run's lease.
    """
    tree, tensors = _split(checkpoint.state)
    rows = {name: tensor for name, tensor in tensors.items() if shards is not None and name.startswith(ROWS)}
    if shards is not None and shards.ranks.rank:
        shards.write_with_first(target.parent, rows, write_tensors)
        return
    if target.exists() and not (target / _DOCUMENT).exists():
        remove_checkpoint(target)  # damaged, and passed over when the run was resumed
    with atomic_directory(target, mode=PRIVATE_DIRECTORY, replaces=_DOCUMENT) as folder:
        digests = {} if shards is None else shards.write_first(target.parent, folder, rows, write_tensors)
        common = {name: tensor for name, tensor in tensors.items() if name not in rows}
        document = {
            "run": marks,
            "step": checkpoint.step,
            "state": tree,
            "dp_event": checkpoint.event,
            "processor": checkpoint.processor,
            "test_key": checkpoint.key is not None and checkpoint.key.is_test,
            "sha256": {_STATE: write_tensors(folder / _STATE, common), **digests},
        }
        if shards is not None:
            document["shards"] = shards.described()
        if checkpoint.key is not None:
            document["sha256"] |= {_KEY: _write_private(folder / _KEY, checkpoint.key.to_bytes())}
        document["sha256"] |= {_DOCUMENT: _digest(document)}
        version = _UNSHARDED_VERSION if shards is None else _CHECKPOINT_VERSION
        write_json(folder / _DOCUMENT, document, format_version=version, mode=PRIVATE_FILE)
    if shards is not None:
        shards.kept(checkpoint.step)


def has_key(folder: Path) -> bool:
    """Whether the checkpoint still has its noise key."""
    return (folder / _KEY).exists()


def destroy_key(folder: Path) -> None:
    """Overwrite and remove the noise key of a checkpoint, if it has one."""
    destroy_file(folder / _KEY)


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


def _open_private(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE), "wb")


def _write_private(path: Path, data: bytes) -> str:
    with _open_private(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def destroy_file(path: Path) -> None:
    """Overwrite a file that holds a key, and remove it; nothing happens where there is none."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    sync_directory(path.parent)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its key first."""
    for key in [*folder.glob(_KEY), *folder.glob(f"*/{_KEY}")]:
        destroy_file(key)
    shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def read_checkpoint(folder: Path, places: Mapping[str, range] | None = None) -> tuple[Checkpoint, dict[str, Any]]:
    """A whole checkpoint, and what it says of the run that wrote it (nothing, where an older lazydp wrote it).

    Args:
        folder: of the checkpoint.
        places: of the rows that are wanted, by table; None: all. Of a checkpoint whose rows lie in several files, the
            others are not read.
    """
    document = read_json(folder / _DOCUMENT, format_version=_CHECKPOINT_VERSION, what="checkpoint")
    digests = document.get("sha256", {})
    if digests.pop(_DOCUMENT, None) != _digest(document):
        raise IntegrityError(f"{folder / _DOCUMENT} differs from its digest")
    shards = document.get("shards")
    of_shards = {of["file"]: digests.pop(of["file"], "") for of in shards or ()}
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
    if shards is not None:
        tensors |= read_rows(folder, shards, of_shards, places)
    state = _join(document["state"], tensors)
    found = Checkpoint(
        step=document["step"], state=state, event=document["dp_event"], key=key, processor=document.get("processor")
    )
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
