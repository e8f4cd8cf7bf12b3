"""Opens a bundle: everything is checked first, then tables are mapped into memory rather than read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle import inventory, tensors
from lazydp.components.bundle import items as item_tables
from lazydp.components.bundle.items import ItemTable
from lazydp.components.bundle.manifest import BundleManifest, TableEntry
from lazydp.components.bundle.signature import check_signature
from lazydp.components.bundle.writer import (
    DENSE_FILE,
    ITEMS_FILE,
    POPULARITY,
    POPULARITY_FILE,
    VOCABULARY_FOLDER,
    WEIGHT,
)
from lazydp.components.features.batch import ItemCatalogue
from lazydp.components.features.item_tensors import item_catalogue
from lazydp.components.features.spec import ITEM, FeatureSpec
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, ModelConfig, TwoTowerConfig
from lazydp.components.models.recommender import Recommender
from lazydp.components.shared.errors import FormatError, InputError, NonFiniteError, NotPrivateError, PendingNoiseError
from lazydp.components.shared.validation import first_problem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_MODEL_CONFIG: TypeAdapter[DlrmConfig | TwoTowerConfig] = TypeAdapter(ModelConfig)


@dataclass(frozen=True, slots=True)
class Bundle:
    """An exported model, checked and ready to score. Tables are memory-mapped: treat them as read-only.

    Attributes:
        path: the folder.
        manifest: what the folder holds.
        spec: the feature spec.
        model: dense layers, in evaluation mode, without gradients.
        tables: float32 [num_rows, D] by table name.
        vocabularies: of the spec.
        statement: what privacy was spent.
        catalogue: item side; None without an item.
        items: ids, titles and metadata; None without an item.
        popularity: float32 [num_items + 1] noised counts, where a DP mechanism released them.
    """

    path: Path
    manifest: BundleManifest
    spec: FeatureSpec
    model: Recommender
    tables: Mapping[str, Tensor]
    vocabularies: Vocabularies
    statement: PrivacyStatement
    catalogue: ItemCatalogue | None
    items: ItemTable | None
    popularity: Tensor | None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        verify: bool = True,
        allow_test_key: bool = False,
        allow_non_private: bool = False,
        signed_by: Sequence[Ed25519PublicKey] = (),
    ) -> Self:
        """Open the bundle `path`.

        Args:
            path: the folder (may itself be a link: a pointer to the version in use).
            verify: read every byte and compare digests; names and sizes are compared in any case.
            allow_test_key: accept a model whose noise key was made for tests; also allows what only tests need.
            allow_non_private: accept a model trained without privacy.
            signed_by: public keys, one of which must have signed the bundle; none where no signature is asked for.

        Raises:
            FormatError: not a bundle, of a newer format, or not well-formed.
            IntegrityError: a file is missing, extra or corrupted, or the signature is missing or wrong.
            PendingNoiseError: a row has not caught up with its noise.
            NotPrivateError: trained without privacy or under a test key, and not allowed.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FormatError(f"no bundle at {folder}: expected a folder written by `lazydp export`")
        folder = folder.resolve()
        if signed_by:
            check_signature(folder, signed_by)
        manifest = BundleManifest.load(folder)
        _refuse_not_private(folder, manifest, allow_test_key=allow_test_key, allow_non_private=allow_non_private)
        _refuse_pending(folder, manifest)
        inventory.check(folder, manifest.files, digests=verify)
        try:
            return cls._load(folder, manifest, verify=verify)
        except ValidationError as error:
            raise FormatError(f"bundle {folder}: {first_problem(error)}") from error
        except (InputError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
            if isinstance(error, FormatError):
                raise
            # Messages of torch go on with a trace of its C++.
            reason = str(error).partition("\n")[0][:300] or type(error).__name__
            raise FormatError(f"bundle {folder}: {reason}") from error

    @classmethod
    def _load(cls, folder: Path, manifest: BundleManifest, *, verify: bool) -> Self:
        statement = PrivacyStatement.model_validate(manifest.privacy)
        _refuse_contradiction(folder, manifest, statement)
        spec = FeatureSpec.from_document(manifest.features, where=f"bundle {folder}")
        config = _MODEL_CONFIG.validate_python(manifest.model)
        listed = {entry.path for entry in manifest.files}
        with torch.device("meta"):
            # Shapes first, at no cost: a hostile configuration must not allocate what no file backs.
            shape = build_model(spec, config)
        table_entries = _matching_tables(folder, manifest, shape)
        state = tensors.read(
            folder / DENSE_FILE, {name: (value.dtype, tuple(value.shape)) for name, value in shape.state_dict().items()}
        )
        _refuse_not_finite(folder / DENSE_FILE, state)
        tables = {entry.name: _table(folder, entry, verify=verify) for entry in table_entries}
        model = build_model(spec, config)
        model.load_state_dict(state)
        model.requires_grad_(requires_grad=False).eval()
        num_items = spec.tables()[ITEM] - 1 if spec.item is not None else 0
        table = item_tables.read(folder / ITEMS_FILE, num_items=num_items) if spec.item is not None else None
        catalogue = item_catalogue(spec, table) if table is not None else None
        if catalogue is not None:
            _refuse_foreign_rows(folder, spec, catalogue)
        return cls(
            path=folder,
            manifest=manifest,
            spec=spec,
            model=model,
            tables=tables,
            vocabularies=Vocabularies.load(spec, folder / VOCABULARY_FOLDER),
            statement=statement,
            catalogue=catalogue,
            items=ItemTable(table) if table is not None else None,
            popularity=_popularity(folder, num_items) if POPULARITY_FILE in listed else None,
        )


def _refuse_foreign_rows(folder: Path, spec: FeatureSpec, catalogue: ItemCatalogue) -> None:
    for feature in spec.item_features():
        values = catalogue.bags[feature.name].values
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < feature.num_rows:
            raise FormatError(
                f"bundle {folder}: {ITEMS_FILE} has a row of {feature.name!r} outside 0..{feature.num_rows - 1}"
            )


def _popularity(folder: Path, num_items: int) -> Tensor:
    found = tensors.read(folder / POPULARITY_FILE, {POPULARITY: (torch.float32, (num_items + 1,))})
    _refuse_not_finite(folder / POPULARITY_FILE, found)
    return found[POPULARITY]


def _refuse_not_finite(path: Path, found: Mapping[str, Tensor]) -> None:
    for name, value in found.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NonFiniteError(f"{path}: tensor {name!r} holds values that are not finite; export the run again")


def _table(folder: Path, entry: TableEntry, *, verify: bool) -> Tensor:
    shape = (entry.num_rows, entry.dim)
    weight = tensors.read(folder / entry.file, {WEIGHT: (torch.float32, shape)})[WEIGHT]
    # A digest vouches for the copy, not for what was written.
    if verify and not torch.isfinite(weight.sum(dtype=torch.float64)):
        raise NonFiniteError(f"bundle {folder}: table {entry.name!r} holds values that are not finite")
    return weight


def _matching_tables(folder: Path, manifest: BundleManifest, model: Recommender) -> tuple[TableEntry, ...]:
    listed = {table.name: (table.num_rows, table.dim) for table in manifest.tables}
    needed = {name: (shape.num_rows, shape.dim) for name, shape in model.tables.items()}
    if listed != needed:
        odd = sorted(set(listed.items()) ^ set(needed.items()))[0][0]
        raise FormatError(
            f"bundle {folder}: table {odd!r} is {listed.get(odd, 'missing')} in the manifest and "
            f"{needed.get(odd, 'missing')} in the model"
        )
    return manifest.tables


def _refuse_not_private(
    folder: Path, manifest: BundleManifest, *, allow_test_key: bool, allow_non_private: bool
) -> None:
    if manifest.test_key and not allow_test_key:
        raise NotPrivateError(
            f"bundle {folder} was made under a noise key for tests, so it is not private: "
            "export a run with a real key, or say --allow-test-key"
        )
    stated = manifest.mode != "sgd" and manifest.privacy.get("private") is True
    if not stated and not manifest.test_key and not allow_non_private:
        raise NotPrivateError(
            f"bundle {folder} was trained without privacy (mode {manifest.mode}): "
            "train with --mode lazydp, or say --allow-non-private"
        )


def _refuse_contradiction(folder: Path, manifest: BundleManifest, statement: PrivacyStatement) -> None:
    claims = statement.private or statement.epsilon is not None
    if (claims and not manifest.private) or statement.test_key != manifest.test_key:
        raise FormatError(
            f"bundle {folder}: the privacy statement claims what mode {manifest.mode!r} and "
            f"test_key {manifest.test_key} deny"
        )
    if claims and statement.popularity is None and any(entry.path == POPULARITY_FILE for entry in manifest.files):
        raise FormatError(f"bundle {folder}: the privacy statement says nothing of the counts in {POPULARITY_FILE}")


def _refuse_pending(folder: Path, manifest: BundleManifest) -> None:
    for table in manifest.tables:
        if table.flushed_step != manifest.step:
            raise PendingNoiseError(
                f"bundle {folder}: table {table.name!r} is flushed up to step {table.flushed_step} of {manifest.step}, "
                "so a row has pending noise: export the run again"
            )
