"""Encoded examples as tensors: bags, batches, and the catalogue of items that candidates are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bags:
    """`size` bags of row numbers of one table, one after the other.

    values: int64 [N], all lookups. offsets: int64 [size + 1], bag g is values[offsets[g]:offsets[g + 1]].
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("values", self.values), ("offsets", self.offsets)):
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise ValueError(f"{name}: expected int64 [n], found {tensor.dtype} {list(tensor.shape)}")
        if self.offsets.numel() == 0:
            raise ValueError("offsets: expected one more entry than bags, found none")

    @classmethod
    def single(cls, values: Tensor) -> Self:
        """One bag of one row for every entry of values [n]."""
        return cls(values, torch.arange(values.numel() + 1, device=values.device))

    @property
    def size(self) -> int:
        """Number of bags."""
        return self.offsets.numel() - 1

    def lengths(self) -> Tensor:
        """Lookups of each bag, int64 [size]."""
        return self.offsets[1:] - self.offsets[:-1]

    def take(self, rows: Tensor) -> Self:
        """The bags `rows` (int64 [n], any order, repeats allowed), in that order."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        positions = torch.repeat_interleave(starts - offsets[:-1], lengths)
        positions += torch.arange(positions.numel(), device=rows.device)
        return type(self)(self.values[positions], offsets)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same bags on another device."""
        return type(self)(
            self.values.to(device, non_blocking=non_blocking), self.offsets.to(device, non_blocking=non_blocking)
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """`size` examples (0 is legal: a Poisson sample may be empty).

    labels: float32 [B]. dense: float32 [B, n], user and context features in spec order, in [-1, 1].
    bags: one bag an example for each of `FeatureSpec.example_features()`, by name.
    item: int64 [B] item codes (1..num_items in training; 0 = unknown), None without an item.
    user_index: int64 [B] number of the user in the dataset (0..num_users - 1), None without a user column.
    """

    size: int
    labels: Tensor
    dense: Tensor
    bags: dict[str, Bags]
    item: Tensor | None
    user_index: Tensor | None

    def __post_init__(self) -> None:
        sizes = {"labels": self.labels.shape[0], "dense": self.dense.shape[0]}
        sizes |= {f"bags[{name!r}]": bags.size for name, bags in self.bags.items()}
        sizes |= {
            name: tensor.shape[0]
            for name, tensor in (("item", self.item), ("user_index", self.user_index))
            if tensor is not None
        }
        for name, size in sizes.items():
            if size != self.size:
                raise ValueError(f"{name}: expected {self.size} examples, found {size}")

    def take(self, rows: Tensor) -> Batch:
        """The examples `rows` (int64 [n]) of this batch, in that order: a micro-batch."""
        return Batch(
            size=rows.numel(),
            labels=self.labels[rows],
            dense=self.dense[rows],
            bags={name: bags.take(rows) for name, bags in self.bags.items()},
            item=None if self.item is None else self.item[rows],
            user_index=None if self.user_index is None else self.user_index[rows],
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same examples on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return Batch(
            size=self.size,
            labels=self.labels.to(device, non_blocking=non_blocking),
            dense=self.dense.to(device, non_blocking=non_blocking),
            bags={name: bags.to(device, non_blocking=non_blocking) for name, bags in self.bags.items()},
            item=moved(self.item),
            user_index=moved(self.user_index),
        )


class ItemCatalogue:
    """The public features of every item code 0..num_items; row 0 stands for the unknown item.

    num_items: known items, codes 1..num_items. dense: float32 [num_items + 1, m].
    bags: one bag a code for each of `FeatureSpec.item_features()`, by name ("item" is the code itself).
    """

    def __init__(self, *, num_items: int, dense: Tensor, bags: Mapping[str, Bags]) -> None:
        rows = num_items + 1
        if dense.dim() != 2 or dense.shape[0] != rows:
            raise ValueError(f"dense: expected [{rows}, m], found {list(dense.shape)}")
        for name, bag in bags.items():
            if bag.size != rows:
                raise ValueError(f"bags[{name!r}]: expected {rows} bags, found {bag.size}")
        self.num_items = num_items
        self.dense = dense
        self.bags = dict(bags)

    def take(self, codes: Tensor) -> tuple[Tensor, dict[str, Bags]]:
        """Features of items.

        Args:
            codes: int64 of any shape S.

        Returns:
            dense float32 [*S, m], and for each item feature the bags of the flattened codes (row-major).

        Raises:
            IndexError: a code outside 0..num_items.
        """
        flat = codes.reshape(-1)
        dense = self.dense[flat].reshape(*codes.shape, self.dense.shape[1])
        return dense, {name: bags.take(flat) for name, bags in self.bags.items()}

    def to(self, device: torch.device | str) -> ItemCatalogue:
        """The same catalogue on another device."""
        return ItemCatalogue(
            num_items=self.num_items,
            dense=self.dense.to(device),
            bags={name: bags.to(device) for name, bags in self.bags.items()},
        )
