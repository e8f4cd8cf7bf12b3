"""The release of a module of one's own: its weights, the privacy statement, and nothing else.

    FOLDER/
      manifest.json         name, version, privacy statement, lineage, digest of the weights
      model.safetensors     the module's state dict, by its keys

`write_module_release` makes the folder whole or not at all, `load_module_release` checks it and gives it back. It is no
bundle: the service cannot answer from it, for only the caller knows the module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle import inventory
from lazydp.components.bundle.manifest import FILE_NAME, FORMAT_VERSION, FileEntry, Lineage, Name, content_version
from lazydp.components.shared.errors import (
    FormatError,
    NonFiniteError,
    NotPrivateError,
    PendingNoiseError,
    UnavailableError,
)
from lazydp.components.shared.files import atomic_directory, read_json, write_json
from lazydp.components.shared.frozen_model import FrozenModel
from lazydp.components.shared.validation import Document

WEIGHTS_FILE = "model.safetensors"


class ModuleManifest(FrozenModel):
    """Everything about a release but its weights.

    Attributes:
        kind: tells it from a bundle.
        name: of the model.
        version: equal content has equal versions.
        test_key: whether the noise key was one made for tests, which makes the model not private.
        step: the step that the weights stand at.
        flushed_steps: for each embedding layer the least step up to which a row contains its noise; equal to `step`.
        privacy: the privacy statement.
        lineage: where the model came from.
        files: every file of the folder except the manifest.
    """

    kind: Literal["module"] = "module"
    name: Name
    version: Name
    test_key: bool
    step: Annotated[int, Field(ge=1)]
    flushed_steps: dict[str, int]
    privacy: PrivacyStatement
    lineage: Lineage
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=1)]


@dataclass(frozen=True, slots=True)
class ModuleRelease:
    """A released module, checked.

    Attributes:
        path: the folder.
        manifest: what it holds.
        statement: what privacy was spent.
        weights: the module's state dict, mapped into memory; `module.load_state_dict(release.weights)`.
    """

    path: Path
    manifest: ModuleManifest
    statement: PrivacyStatement
    weights: dict[str, Tensor]


def write_module_release(
    path: Path,
    *,
    name: str,
    test_key: bool,
    step: int,
    weights: Mapping[str, Tensor],
    flushed_steps: Mapping[str, int],
    statement: PrivacyStatement,
    lineage: Lineage,
    commit: Callable[[str], None],
) -> ModuleManifest:
    """Write the release `path`, a folder that must not exist yet.

    Args:
        path: the folder.
        name: of the model, `[A-Za-z0-9._-]`.
        test_key: whether the noise key was one made for tests.
        step: the step that the weights stand at.
        weights: the module's state dict.
        flushed_steps: for each embedding layer the least step up to which a row contains its noise.
        statement: what privacy was spent.
        lineage: where the model came from.
        commit: charges the budget for the version; called when the folder is whole, before it has its name.

    Raises:
        PendingNoiseError: a row has pending noise.
        NonFiniteError: a weight is not finite.
        InputError: the folder exists.
    """
    _refuse_pending(str(path), flushed_steps, step)
    _refuse_not_finite(str(path), weights)
    with atomic_directory(path) as folder:
        file = folder / WEIGHTS_FILE
        try:
            save_file(_apart(weights), file)
        except SafetensorError as error:  # what it makes of a full disk
            raise UnavailableError(f"{file} cannot be written: {' '.join(str(error).split())}") from error
        file.chmod(0o644)
        files = inventory.take(folder)
        described = {"name": name, "step": step, "privacy": statement.model_dump(mode="json")}
        manifest = ModuleManifest(
            name=name,
            version=content_version(files, json.dumps(described, sort_keys=True)),
            test_key=test_key,
            step=step,
            flushed_steps=dict(flushed_steps),
            privacy=statement,
            lineage=lineage,
            files=files,
        )
        write_json(folder / FILE_NAME, manifest.model_dump(mode="json"), format_version=FORMAT_VERSION)
        commit(manifest.version)
    return manifest


def load_module_release(path: str | Path, *, verify: bool = True, allow_test_key: bool = False) -> ModuleRelease:
    """Open what `export_module` wrote.

    Args:
        path: the folder.
        verify: read every byte and compare digests; names and sizes are compared in any case.
        allow_test_key: accept a model whose noise key was made for tests.

    Raises:
        FormatError: not such a release, of a newer format, or not well-formed.
        IntegrityError: a file is missing, extra or corrupted.
        PendingNoiseError: a row has pending noise.
        NonFiniteError: a weight is not finite.
        NotPrivateError: trained under a test key, and not allowed.
    """
    folder = Path(path).resolve()
    where = f"release {folder}"
    document = read_json(folder / FILE_NAME, format_version=FORMAT_VERSION, what="release manifest")
    if document.get("kind") != "module":
        raise FormatError(f"{where} is no release of export_module: open a bundle with lazydp.api.Bundle.open")
    manifest = Document(where, document).validated(ModuleManifest, raises=FormatError)
    if manifest.test_key and not allow_test_key:
        raise NotPrivateError(
            f"{where} was made under a noise key for tests, so it is not private: train with a key of the system's "
            "generator, or give allow_test_key=True"
        )
    if manifest.privacy.test_key != manifest.test_key or (manifest.privacy.private and manifest.test_key):
        raise FormatError(f"{where}: the privacy statement claims what test_key {manifest.test_key} denies")
    _refuse_pending(where, manifest.flushed_steps, manifest.step)
    inventory.check(folder, manifest.files, digests=verify)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{where}: {WEIGHTS_FILE} cannot be read: {' '.join(str(error).split())}") from error
    _refuse_not_finite(where, weights)
    return ModuleRelease(folder, manifest, manifest.privacy, weights)


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host, contiguous, and none in the memory of another: safetensors writes no shared ones."""
    seen: set[int] = set()
    found = {}
    for name, tensor in weights.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        found[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return found


def _refuse_pending(where: str, flushed_steps: Mapping[str, int], step: int) -> None:
    for table, flushed in flushed_steps.items():
        if flushed != step:
            raise PendingNoiseError(
                f"{where}: embedding layer {table!r} is flushed up to step {flushed} of {step}, so a row has pending "
                "noise: export the model again"
            )


def _refuse_not_finite(where: str, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{where}: tensor {name!r} holds values that are not finite: the run diverged")
