"""What the operators return, in shapes alone: for torch.compile, torch.export and opcheck."""

from __future__ import annotations

import torch
from torch import Tensor

import lazydp.kernels._C  # noqa: F401  (the schemas must be there first)

_MUTATING = (
    "normal_",
    "flush_",
    "foreach_catch_up_",
    "foreach_catch_up_bag_sum_",
    "foreach_scatter_add_",
    "weighted_product_",
    "weighted_sum_",
    "noised_sum_",
)


def _nothing(*_: object) -> None:
    return None


def _group_rows(indices: list[Tensor], num_rows: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    counts = [torch.library.get_ctx().new_dynamic_size() for _ in indices]
    rows = [of.new_empty(count) for of, count in zip(indices, counts, strict=True)]
    starts = [of.new_empty(count + 1) for of, count in zip(indices, counts, strict=True)]
    return rows, [torch.empty_like(of) for of in indices], starts


def _bag_sum(weights: list[Tensor], indices: list[Tensor], offsets: list[Tensor], *_: object) -> list[Tensor]:
    return [weight.new_empty(ends.shape[0] - 1, weight.shape[1]) for weight, ends in zip(weights, offsets, strict=True)]


def _bag_ids(offsets: list[Tensor]) -> list[Tensor]:
    return [ends.new_empty(torch.library.get_ctx().new_dynamic_size()) for ends in offsets]


def _bag_sq_norms(indices: list[Tensor], offsets: list[Tensor], grads: list[Tensor], *_: object) -> Tensor:
    return grads[0].new_empty(grads[0].shape[1], dtype=torch.float64)


def _product_sq_norms(inputs: list[Tensor], *_: object) -> Tensor:
    return inputs[0].new_empty(inputs[0].shape[0], dtype=torch.float64)


def _chacha_words(key: Tensor, stream: int, counter: int, n: int) -> Tensor:
    return key.new_empty(n, dtype=torch.int32)


def _normals_of_blocks(words: Tensor) -> Tensor:
    return words.new_empty(words.shape[0], 12, dtype=torch.float32)


for _name in _MUTATING:
    torch.library.register_fake(f"lazydp::{_name}", _nothing)
torch.library.register_fake("lazydp::foreach_group_rows", _group_rows)
torch.library.register_fake("lazydp::foreach_bag_sum", _bag_sum)
torch.library.register_fake("lazydp::foreach_bag_ids", _bag_ids)
torch.library.register_fake("lazydp::foreach_bag_sq_norms", _bag_sq_norms)
torch.library.register_fake("lazydp::foreach_product_sq_norms", _product_sq_norms)
torch.library.register_fake("lazydp::chacha_words", _chacha_words)
torch.library.register_fake("lazydp::chacha20_blocks", torch.empty_like)
torch.library.register_fake("lazydp::normals_of_blocks", _normals_of_blocks)
