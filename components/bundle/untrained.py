"""Bundles of untrained models over made-up items: for benchmarks and tests of the service, marked as not private."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle.manifest import BundleManifest, Lineage
from lazydp.components.bundle.writer import write_bundle
from lazydp.components.features.catalogue import catalogue_table
from lazydp.components.features.spec import FeatureSpec
from lazydp.components.features.vocabulary import Vocabularies
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.recommender import initial_tables

GENRES = ("Action", "Comedy", "Drama", "Horror", "Romance")
DATASET = "untrained"


def feature_spec(*, num_users: int, num_items: int, **changes: Any) -> FeatureSpec:
    """A spec with users, items, a history, a context feature and a dense one; `changes` replace its fields."""
    document: dict[str, Any] = {
        "name": DATASET,
        "user": {"column": "user", "vocabulary": {"kind": "integer", "size": num_users}},
        "item": {
            "column": "item",
            "vocabulary": {"kind": "integer", "size": num_items},
            "title": "title",
            "metadata": ["genre", "year"],
        },
        "items": {"path": "items.parquet", "key": "item"},
        "label": {"kind": "implicit"},
        "history": {"max_length": 20},
        "max_examples_per_user": 50,
        "features": [
            {
                "name": "device",
                "kind": "single",
                "source": "context",
                "vocabulary": {"kind": "declared", "values": ["phone", "tablet", "desktop"]},
            },
            {"name": "age", "kind": "dense", "source": "context", "bounds": [0, 100]},
        ],
    }
    return FeatureSpec.model_validate(document | changes)


def write_untrained(
    path: Path,
    *,
    kind: Literal["two_tower", "dlrm"] = "two_tower",
    num_users: int = 50,
    num_items: int = 200,
    dim: int = 16,
    seed: int = 0,
    name: str = "untrained",
    spec: FeatureSpec | None = None,
    popularity: bool = False,
    replace: bool = False,
) -> BundleManifest:
    """Write a bundle with initial weights from `seed`.

    Args:
        path: the folder.
        kind: of model.
        num_users: user ids "0" to "num_users - 1".
        num_items: item ids likewise, each with a title, one or two genres and a year.
        dim: of the embeddings.
        seed: of the weights; another seed makes another version.
        name: of the model.
        spec: instead of `feature_spec`.
        popularity: whether to add counts, to fall back to.
        replace: replace an existing bundle.
    """
    spec = spec or feature_spec(num_users=num_users, num_items=num_items)
    vocabularies = Vocabularies(spec, {})
    config: TwoTowerConfig | DlrmConfig = (
        TwoTowerConfig(embedding_dim=dim, seed=seed, embedding_init_std=1.0)
        if kind == "two_tower"
        else DlrmConfig(embedding_dim=dim, seed=seed, embedding_init_std=1.0)
    )
    model = build_model(spec, config)
    tables = initial_tables(model)
    counts = np.random.default_rng(seed).permutation(num_items + 1).astype(np.float32)
    return write_bundle(
        path,
        name=name,
        mode="lazydp",
        test_key=True,
        step=0,
        model=model,
        table_weights=tables,
        flushed_steps=dict.fromkeys(tables, 0),
        spec=spec,
        vocabularies=vocabularies,
        statement=_statement(),
        lineage=Lineage(
            run_id="untrained", dataset=DATASET, config="none", code_version="none", created="1970-01-01T00:00:00Z"
        ),
        items=catalogue_table(spec, vocabularies, _items(num_items)),
        popularity=torch.from_numpy(counts) if popularity else None,
        replace=replace,
    )


def _items(num_items: int) -> pa.Table:
    numbers = range(num_items)
    first = [GENRES[n % len(GENRES)] for n in numbers]
    second = [GENRES[n % 3] for n in numbers]
    return pa.table(
        {
            "item": [str(n) for n in numbers],
            "title": [f"Title of item {n}" for n in numbers],
            "genre": [a if a == b else f"{a}|{b}" for a, b in zip(first, second, strict=True)],
            "year": [1950 + n % 70 for n in numbers],
        }
    )


def _statement() -> PrivacyStatement:
    return PrivacyStatement(
        private=False,
        why_not_private="an untrained model, for benchmarks and tests of the service",
        epsilon=None,
        delta=1e-5,
        accountant="none",
        accountant_version="none",
        privacy_unit="example",
        sampler="none",
        noise_multiplier=0.0,
        max_grad_norm=None,
        sampling_prob=1.0,
        steps=0,
        epsilon_without_amplification=None,
        epsilon_user_level=None,
        assumed_public=("everything",),
        not_covered=(),
        test_key=True,
        code_version="none",
    )
