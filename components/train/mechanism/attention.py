"""`nn.MultiheadAttention` in plain tensor operations, so that its products with parameters can be kept.

The equations are those of torch's documentation; Vaswani et al. 2017.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional


def is_plain(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether `attention_forward` knows all that the module does."""
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn


def attention_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `module(query, key, value, ...)` gives: outputs and, where they are needed, attention weights.

    Args:
        module: for which `is_plain` holds.
        query: [N, L, E] with `batch_first`, else [L, N, E]; key and value alike.
        key: see `query`.
        value: see `query`.
        key_padding_mask: [N, S], boolean (true: left out) or added to the scores.
        need_weights: give the weights, too.
        attn_mask: [L, S], likewise.
        average_attn_weights: over the heads.
        is_causal: a hint beside `attn_mask`, which torch wants to be given with it.
    """
    del is_causal
    queries, keys, values = (_heads(module, part) for part in _projected(module, query, key, value))
    mask, of_keys = _added(attn_mask, queries), _added(key_padding_mask, queries)
    if of_keys is not None:
        of_keys = of_keys[:, None, None, :]
        mask = of_keys if mask is None else mask + of_keys
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(module.head_dim)
        weights = functional.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
        found = weights @ values
    else:
        found = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
    output = functional.linear(found.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    output = output if module.batch_first else output.transpose(0, 1)
    return output, weights.mean(dim=1) if weights is not None and average_attn_weights else weights


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    bias = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    elif query is key and key is value:
        return list(functional.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, -1))
    elif key is value:
        size = module.embed_dim
        of_query, of_others = torch.split(module.in_proj_weight, [size, 2 * size])
        bias_of_query, bias_of_others = (
            (None, None) if bias[0] is None else torch.split(module.in_proj_bias, [size, 2 * size])
        )
        queries = functional.linear(query, of_query, bias_of_query)
        return [queries, *functional.linear(key, of_others, bias_of_others).chunk(2, -1)]
    else:
        weights = list(module.in_proj_weight.chunk(3))
    parts = zip((query, key, value), weights, bias, strict=True)
    return [functional.linear(part, weight, added) for part, weight, added in parts]


def _heads(module: nn.MultiheadAttention, tensor: Tensor) -> Tensor:
    """[N, heads, L, E / heads]."""
    tensor = tensor if module.batch_first else tensor.transpose(0, 1)
    return torch.unflatten(tensor, -1, (module.num_heads, module.head_dim)).transpose(1, 2)


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What a mask adds to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, -math.inf)
