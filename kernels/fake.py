"""What the operators return, in shapes alone: for torch.compile, torch.export and opcheck."""

from __future__ import annotations

import torch
from torch import Tensor

import lazydp.kernels._C  # noqa: F401  (the schemas must be there first)

_MUTATING = ("normal_", "catch_up_", "flush_", "scatter_add_")


def _nothing(*_: object) -> None:
    return None


def _group_rows(indices: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = torch.library.get_ctx().new_dynamic_size()
    return indices.new_empty(groups), torch.empty_like(indices), indices.new_empty(groups + 1)


def _bag_sum(weight: Tensor, indices: Tensor, offsets: Tensor, per_lookup_weights: Tensor | None) -> Tensor:
    return weight.new_empty(offsets.shape[0] - 1, weight.shape[1])


def _catch_up_bag_sum(weight: Tensor, *rest: object) -> Tensor:
    offsets = rest[12]
    assert isinstance(offsets, Tensor)
    return weight.new_empty(offsets.shape[0] - 1, weight.shape[1])


def _bag_ids(offsets: Tensor) -> Tensor:
    return offsets.new_empty(torch.library.get_ctx().new_dynamic_size())


def _bag_sq_norms(indices: Tensor, offsets: Tensor, grad: Tensor, per_lookup_weights: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[1])


def _chacha_words(key: Tensor, stream: int, counter: int, n: int) -> Tensor:
    return key.new_empty(n, dtype=torch.int32)


def _normals_of_blocks(words: Tensor) -> Tensor:
    return words.new_empty(words.shape[0], 12, dtype=torch.float32)


for _name in _MUTATING:
    torch.library.register_fake(f"lazydp::{_name}", _nothing)
torch.library.register_fake("lazydp::group_rows", _group_rows)
torch.library.register_fake("lazydp::bag_sum", _bag_sum)
torch.library.register_fake("lazydp::catch_up_bag_sum_", _catch_up_bag_sum)
torch.library.register_fake("lazydp::bag_ids", _bag_ids)
torch.library.register_fake("lazydp::bag_sq_norms", _bag_sq_norms)
torch.library.register_fake("lazydp::chacha_words", _chacha_words)
torch.library.register_fake("lazydp::chacha20_blocks", torch.empty_like)
torch.library.register_fake("lazydp::normals_of_blocks", _normals_of_blocks)
