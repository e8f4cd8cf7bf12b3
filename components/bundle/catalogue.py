"""The item side of a bundle: what the model reads of every item, as tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lazydp.components.bundle import tensors
from lazydp.components.features.batch import Bags, ItemCatalogue
from lazydp.components.features.spec import EmbeddedFeature, FeatureSpec
from lazydp.components.shared.errors import FormatError

FILE_NAME = "catalogue.safetensors"
_DENSE = "dense"


def _keys(name: str) -> tuple[str, str]:
    return f"bags.{name}.values", f"bags.{name}.offsets"


def write(folder: Path, catalogue: ItemCatalogue) -> None:
    """Write `folder`/catalogue.safetensors."""
    parts: dict[str, Tensor] = {_DENSE: catalogue.dense}
    for name, bags in catalogue.bags.items():
        values, offsets = _keys(name)
        parts |= {values: bags.values, offsets: bags.offsets}
    tensors.write(folder / FILE_NAME, parts)


def read(folder: Path, spec: FeatureSpec) -> ItemCatalogue:
    """Read `folder`/catalogue.safetensors.

    Raises:
        FormatError: names, shapes, offsets or row numbers that don't fit `spec`.
    """
    path = folder / FILE_NAME
    features = spec.item_features()
    rows = {feature.name: feature.num_rows for feature in features}["item"]
    expected: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        _DENSE: (torch.float32, (rows, spec.num_item_dense))
    }
    for feature in features:
        values, offsets = _keys(feature.name)
        expected |= {values: (torch.int64, (None,)), offsets: (torch.int64, (rows + 1,))}
    parts = tensors.read(path, expected)
    bags = {feature.name: _bags(path, feature, parts) for feature in features}
    return ItemCatalogue(num_items=rows - 1, dense=parts[_DENSE], bags=bags)


def _bags(path: Path, feature: EmbeddedFeature, parts: dict[str, Tensor]) -> Bags:
    values, offsets = (parts[key] for key in _keys(feature.name))
    starts_and_ends = int(offsets[0]) == 0 and int(offsets[-1]) == values.numel()
    if not starts_and_ends or bool((offsets[1:] < offsets[:-1]).any()):
        raise FormatError(f"{path}: the offsets of {feature.name!r} don't ascend from 0 to {values.numel()}")
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < feature.num_rows:
        raise FormatError(f"{path}: {feature.name!r} names a row outside 0..{feature.num_rows - 1}")
    return Bags(values, offsets)
