"""The manifest of a bundle: what the folder holds, what the model is, and what privacy was spent on it."""

from __future__ import annotations

import hashlib
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from lazydp.components.shared.errors import FormatError
from lazydp.components.shared.files import read_json, write_json
from lazydp.components.shared.frozen_model import FrozenModel
from lazydp.components.shared.validation import Document

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
SIGNATURE_FILE = "bundle.sig"
# A manifest describes; it does not carry data. Anything larger was not written by lazydp.
MAX_BYTES = 64 * 2**20
MAX_SIGNATURE_BYTES = 4096

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Relative, POSIX, no empty part, no part that begins with a dot: nothing such a path names lies outside the folder.
RelativePath = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}$", max_length=255)
]


class FileEntry(FrozenModel):
    """One file of the bundle.

    Attributes:
        path: relative to the bundle's folder.
        sha256: hexadecimal digest of the bytes.
        size: bytes.
    """

    path: RelativePath
    sha256: Sha256
    size: Annotated[int, Field(ge=0, lt=2**53)]


class TableEntry(FrozenModel):
    """One embedding table.

    Attributes:
        name: as the feature spec names it.
        file: the safetensors file that holds it under the name `weight`.
        num_rows: rows R.
        dim: width D.
        dtype: of the weights.
        flushed_step: the least step up to which a row of the table contains its noise; equal to the run's
            step, or a row is pending.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    file: RelativePath
    num_rows: Annotated[int, Field(ge=1, lt=2**40)]
    dim: Annotated[int, Field(ge=1, le=65536)]
    dtype: Literal["float32"] = "float32"
    flushed_step: Annotated[int, Field(ge=0)]


class Lineage(FrozenModel):
    """Where the model came from; nothing in it is computed from private data but the dataset's identifier.

    Attributes:
        run_id: the run, as the ledger knows it.
        dataset: identifier of the dataset in the ledger: a hash of its content under the ledger's secret, which tells
            nothing without it, except that two releases of one ledger were made from equal data where it is the same
            (`budget.ledger.identifiers`). `unregistered` where the run had no ledger.
        config: digest of the training configuration.
        code_version: of lazydp.
        created: time of the export, ISO 8601, UTC.
        ledger_head: `number:digest` of the ledger's last entry when the bundle was written: a ledger without that entry
            is older than the bundle, or was rewritten. Empty where the run had no ledger.
    """

    run_id: str
    dataset: str
    config: str
    code_version: str
    created: str
    ledger_head: str = ""


class BundleManifest(FrozenModel):
    """Everything about a bundle but its tensors.

    Attributes:
        name: of the model, as the service's paths use it.
        version: derived from the digests of the files, so that equal content has equal versions.
        mode: how it was trained: `lazydp` and `dpsgd` are private, `sgd` is not.
        test_key: whether the noise key was a fixed one made for tests, which makes the model not private.
        step: the step of the run that the weights stand at.
        model: the model's configuration.
        features: the feature spec.
        privacy: the privacy statement.
        tables: the embedding tables.
        lineage: where the model came from.
        files: every file of the folder except the manifest and the signature.
    """

    model_config = ConfigDict(ser_json_inf_nan="null")

    name: Name
    version: Name
    mode: Literal["lazydp", "dpsgd", "sgd"]
    test_key: bool
    step: Annotated[int, Field(ge=0)]
    model: dict[str, Any]
    features: dict[str, Any]
    privacy: dict[str, Any]
    tables: Annotated[tuple[TableEntry, ...], Field(max_length=4096)]
    lineage: Lineage
    files: Annotated[tuple[FileEntry, ...], Field(max_length=65536)]

    @property
    def private(self) -> bool:
        """Whether the model was trained with noise under a key that nobody knows."""
        return self.mode != "sgd" and not self.test_key

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for what, names in (
            ("file", [entry.path for entry in self.files]),
            ("table", [table.name for table in self.tables]),
            ("table file", [table.file for table in self.tables]),
        ):
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is listed twice")
        return self

    @classmethod
    def load(cls, folder: Path) -> BundleManifest:
        """Read and validate `folder`/manifest.json.

        Raises:
            FormatError: missing, too large, not JSON, of a newer format, or not valid; one line, names field and file.
        """
        path = plain_file(folder / FILE_NAME, what="bundle manifest", max_bytes=MAX_BYTES)
        try:
            document = read_json(path, format_version=FORMAT_VERSION, what="bundle manifest")
            return Document(f"bundle manifest {path}", document).validated(cls, raises=FormatError)
        except RecursionError:
            raise FormatError(f"bundle manifest {path} is nested too deeply to be one of ours") from None

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json."""
        write_json(folder / FILE_NAME, self.model_dump(mode="json"), format_version=FORMAT_VERSION)


def plain_file(path: Path, *, what: str, max_bytes: int) -> Path:
    """Give `path` back where it is a plain file of at most `max_bytes`, or nothing at all.

    Raises:
        FormatError: it is a link, a pipe, which would never end, or larger.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return path
    if stat.S_ISLNK(status.st_mode):
        raise FormatError(f"{what} {path} is a symbolic link: a bundle holds plain files only")
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{what} {path} is not a plain file")
    if status.st_size > max_bytes:
        raise FormatError(f"{what} {path} is larger than {max_bytes} bytes: it was not written by lazydp")
    return path


def content_version(files: Sequence[FileEntry], *parts: str) -> str:
    """A version that equal content shares: the first 12 hexadecimal digits of a SHA-256 over the files and `parts`."""
    digest = hashlib.sha256()
    for entry in sorted(files, key=lambda entry: entry.path):
        digest.update(f"{entry.path}\0{entry.sha256}\n".encode())
    for part in parts:
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:12]
