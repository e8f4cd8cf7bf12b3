"""Writes a bundle: whole or not at all, and only what is flushed and finite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle import inventory, tensors
from lazydp.components.bundle.manifest import FILE_NAME, BundleManifest, Lineage, TableEntry, content_version
from lazydp.components.features.item_tensors import item_catalogue
from lazydp.components.features.spec import FeatureSpec
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.models.recommender import Recommender
from lazydp.components.shared.errors import NonFiniteError, PendingNoiseError
from lazydp.components.shared.files import PUBLIC_DIRECTORY, atomic_directory

DENSE_FILE = "dense.safetensors"
ITEMS_FILE = "items.parquet"
POPULARITY_FILE = "popularity.safetensors"
VOCABULARY_FOLDER = "vocab"
TABLE_FOLDER = "tables"
WEIGHT = "weight"
POPULARITY = "count"


def write_bundle(
    path: Path,
    *,
    name: str,
    mode: Literal["lazydp", "dpsgd", "sgd"],
    test_key: bool,
    step: int,
    model: Recommender,
    table_weights: Mapping[str, Tensor],
    flushed_steps: Mapping[str, int],
    spec: FeatureSpec,
    vocabularies: Vocabularies,
    statement: PrivacyStatement,
    lineage: Lineage,
    items: pa.Table | None = None,
    popularity: Tensor | None = None,
    replace: bool = False,
    mode_of_folder: int = PUBLIC_DIRECTORY,
) -> BundleManifest:
    """Write the bundle `path`, a folder that must not exist yet (or is replaced whole).

    Args:
        path: the folder.
        name: of the model, `[A-Za-z0-9._-]`.
        mode: how it was trained.
        test_key: whether the noise key was one made for tests.
        step: the run's step T.
        model: dense layers; only its parameters are stored.
        table_weights: float32 [num_rows, D] of every table of the model.
        flushed_steps: for every table the least entry of `last`, the step up to which every row contains its noise.
        spec: of the ingested dataset, so that declared vocabularies carry their digest.
        vocabularies: of the spec.
        statement: what privacy was spent.
        lineage: where the model came from.
        items: the catalogue table of the dataset (`features.catalogue.catalogue_table`); None without an item.
        popularity: float32 [num_items + 1] noised counts by item code, where a DP mechanism released them (its
            cost is for the caller to state); code 0, of unknown items, is never ranked.
        replace: replace an existing bundle.
        mode_of_folder: permissions of the folder; 0o700 for a bundle that is not released yet.

    Returns:
        The manifest written.

    Raises:
        PendingNoiseError: a row of a table has not caught up to `step`.
        NonFiniteError: a weight or a count is not finite.
        ValueError: tables that are not the model's, or counts that are not the items'.
        InputError: the folder exists, or the items don't fit the spec.
    """
    _refuse_pending(flushed_steps, step)
    _refuse_foreign_tables(model, table_weights, flushed_steps)
    _refuse_non_finite({**table_weights, **model.state_dict()})
    _refuse_foreign_counts(popularity, items)
    if (items is None) != (spec.item is None):
        raise ValueError("items: given exactly where the feature spec has an item")
    if items is not None:
        item_catalogue(spec, items)  # raises where the table does not fit the spec
    with atomic_directory(path, mode=mode_of_folder, replaces=FILE_NAME if replace else None) as folder:
        entries = []
        for table, weight in table_weights.items():
            file = f"{TABLE_FOLDER}/{table}.safetensors"
            tensors.write(folder / file, {WEIGHT: weight})
            rows, dim = weight.shape
            entries.append(TableEntry(name=table, file=file, num_rows=rows, dim=dim, flushed_step=flushed_steps[table]))
        tensors.write(folder / DENSE_FILE, model.state_dict())
        vocabularies.save(folder / VOCABULARY_FOLDER)
        if items is not None:
            pq.write_table(items, folder / ITEMS_FILE)
        if popularity is not None:
            tensors.write(folder / POPULARITY_FILE, {POPULARITY: popularity})
        _publish(folder)
        files = inventory.take(folder)
        described = {
            "model": model.config.model_dump(mode="json"),
            "features": spec.document(),
            "privacy": statement.model_dump(mode="json"),
        }
        manifest = BundleManifest(
            name=name,
            version=content_version(files, json.dumps(described, sort_keys=True)),
            mode=mode,
            test_key=test_key,
            step=step,
            tables=tuple(entries),
            lineage=lineage,
            files=files,
            **described,
        )
        manifest.save(folder)
    return manifest


def _publish(folder: Path) -> None:
    """Files of a release are for everyone to read, whatever umask made them."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _refuse_pending(flushed_steps: Mapping[str, int], step: int) -> None:
    for table, flushed in flushed_steps.items():
        if flushed != step:
            raise PendingNoiseError(
                f"table {table!r} is flushed up to step {flushed} of {step}, so a row still has pending noise: "
                "flush before writing"
            )


def _refuse_foreign_tables(model: Recommender, weights: Mapping[str, Tensor], flushed_steps: Mapping[str, int]) -> None:
    if not set(weights) == set(flushed_steps) == set(model.tables):
        found = f"weights of {sorted(weights)} and flushed steps of {sorted(flushed_steps)}"
        raise ValueError(f"tables: the model has {sorted(model.tables)}, found {found}")
    for name, shape in model.tables.items():
        if tuple(weights[name].shape) != (shape.num_rows, shape.dim) or weights[name].dtype != torch.float32:
            raise ValueError(
                f"table {name!r}: expected float32 [{shape.num_rows}, {shape.dim}], "
                f"found {weights[name].dtype} {list(weights[name].shape)}"
            )


def _refuse_foreign_counts(popularity: Tensor | None, items: pa.Table | None) -> None:
    if popularity is None:
        return
    size = 0 if items is None else items.num_rows
    if tuple(popularity.shape) != (size + 1,) or popularity.dtype != torch.float32:
        raise ValueError(
            f"popularity: expected float32 [{size + 1}], found {popularity.dtype} {list(popularity.shape)}"
        )
    _refuse_non_finite({POPULARITY: popularity})


def _refuse_non_finite(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        # The sum is not finite if an entry isn't, and needs no mask of the table's size.
        if not torch.isfinite(weight.sum(dtype=torch.float64)) and not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"{name!r} holds values that are not finite; nothing was written")
