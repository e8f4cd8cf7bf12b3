"""The operators: noise on rows, and bags of rows. C++ behind `torch.ops.lazydp`; `reference` has the same in torch.

All tensors are contiguous. Embedding weights are float32 [R, D], row ids and offsets int64, `last` int32 [R], a key
the uint8 [32] of `NoiseKey.tensor()`. Every argument is checked before anything is written; what is wrong raises
ValueError with the place and the value. Work is spread over torch's own threads (`torch.set_num_threads`), and no
result depends on their number.

`foreach_f` is `f` of several tables at once (as torch names its own): the same results, but threads start and wait once
for all of them, and Python calls once. A model with many tables is to use these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

import lazydp.kernels._C  # noqa: F401  (loading it registers the operators)
from lazydp.kernels import fake  # noqa: F401  (shapes without data, for torch.compile and opcheck)
from lazydp.kernels.arguments import Distribution, RowGroups, exact_grid

__all__ = [
    "Distribution",
    "RowGroups",
    "SimdLevel",
    "bag_ids",
    "bag_sq_norms",
    "bag_sum",
    "built_with_cuda",
    "catch_up_",
    "catch_up_bag_sum_",
    "chacha20_blocks",
    "chacha_words",
    "exact_grid",
    "flush_",
    "foreach_bag_ids",
    "foreach_bag_sq_norms",
    "foreach_bag_sum",
    "foreach_catch_up_",
    "foreach_catch_up_bag_sum_",
    "foreach_group_rows",
    "foreach_scatter_add_",
    "group_rows",
    "normal_",
    "normals_of_blocks",
    "scatter_add_",
    "set_simd_level",
    "simd_level",
    "simd_levels",
]

SimdLevel = Literal["portable", "avx2", "avx512", "amx"]

_SIMD_LEVELS: tuple[SimdLevel, ...] = ("portable", "avx2", "avx512", "amx")
_lazydp = torch.ops.lazydp


def normal_(out: Tensor, key: Tensor, *, table: int, first_row: int, step: int) -> Tensor:
    """Overwrites `out`, float32 [R, D], with the noise of rows first_row .. first_row + R - 1 of `table` at `step`.

    Standard normals by Box-Muller from ChaCha20; format in `csrc/common/gaussian.h`. Returns `out`.
    """
    _lazydp.normal_(out, key, table, first_row, step)
    return out


def group_rows(indices: Tensor, *, num_rows: int) -> RowGroups:
    """Groups the lookups `indices`, int64 [N] with 0 <= index < num_rows, by row (stable radix sort)."""
    return foreach_group_rows([indices], num_rows=[num_rows])[0]


def foreach_group_rows(indices: Sequence[Tensor], *, num_rows: Sequence[int]) -> list[RowGroups]:
    """`group_rows` of the lookups of several tables."""
    if not indices:
        return []
    return [RowGroups(*parts) for parts in zip(*_lazydp.foreach_group_rows(indices, num_rows), strict=True)]


def catch_up_(
    weight: Tensor,
    last: Tensor,
    rows: Tensor,
    key: Tensor,
    *,
    table: int,
    step: int,
    transition: Tensor,
    factor: Tensor,
    momentum: Tensor | None = None,
    noise: Distribution = "gaussian",
    first_row: int = 0,
) -> None:
    """Brings `rows` of `weight` up to date: applies to each all its pending noise until `step`, as one draw.

    For row r with h = last[r] < step (design, section 4, "Lazy rows" and "Skip-ahead table"):

        dimension 1:  w = transition[h] w + factor[h] z                   z ~ N(0, I), addressed by (table, r, step)
        dimension 2:  (w, v) = M[h] (w, v) + L[h] (z1, z2)                M = [[m11, m12], [m21, m22]], L lower triangle

    and last[r] = step. A row with last[r] = step stays untouched.

    Args:
        weight: float32 [R, D].
        last: int32 [R], the last step whose noise each row contains.
        rows: int64 [U], ascending and distinct (as `RowGroups.rows`).
        key: uint8 [32].
        table: 0 <= table < 65535.
        step: 0 <= step < 2^31; at least every last[r].
        transition: float32 [H, 1], or [H, 4] (m11, m12, m21, m22) with momentum; H above every last[r] < step.
        factor: float32 [H, 1], or [H, 3] (l11, l21, l22) with momentum. Scale (sigma C / b) and sign are the caller's.
        momentum: float32 [R, D] for dimension 2.
        noise: "ones" replaces every z by 1, to test lazy against eager exactly.
        first_row: where `weight` is a shard of a table, the number in that table of the shard's row 0. It is added to
            the row in the address of the noise, so that a shard gets the noise of its rows of the whole table.
    """
    foreach_catch_up_(
        [weight],
        [last],
        [rows],
        key,
        tables=[table],
        step=step,
        transition=transition,
        factor=factor,
        momenta=_listed(momentum),
        noise=noise,
        first_rows=[first_row],
    )


def foreach_catch_up_(
    weights: Sequence[Tensor],
    last: Sequence[Tensor],
    rows: Sequence[Tensor],
    key: Tensor,
    *,
    tables: Sequence[int],
    step: int,
    transition: Tensor,
    factor: Tensor,
    momenta: Sequence[Tensor] | None = None,
    noise: Distribution = "gaussian",
    first_rows: Sequence[int] | None = None,
) -> None:
    """`catch_up_` of several tables that share optimizer and step.

    No two tensors that are written may share memory, and the numbers `tables` must differ: a table listed twice would
    get its noise twice, and two tables of one number would get the same.
    """
    if not weights:
        return
    _refuse_several_devices(weights)
    _lazydp.foreach_catch_up_(
        weights,
        last,
        rows,
        key,
        tables,
        _or_zeros(first_rows, weights),
        step,
        transition,
        factor,
        momenta or [],
        _is_ones(noise),
    )


def flush_(
    weight: Tensor,
    last: Tensor,
    key: Tensor,
    *,
    table: int,
    step: int,
    transition: Tensor,
    factor: Tensor,
    momentum: Tensor | None = None,
    noise: Distribution = "gaussian",
    first_row: int = 0,
) -> None:
    """`catch_up_` of every row of the table, in place; allocates nothing of table size."""
    _lazydp.flush_(weight, last, key, table, first_row, step, transition, factor, momentum, _is_ones(noise))


def bag_sum(weight: Tensor, indices: Tensor, offsets: Tensor, per_lookup_weights: Tensor | None = None) -> Tensor:
    """Sums of bags of rows: out[g] = sum over i in offsets[g] .. offsets[g + 1] of w_i weight[indices[i]].

    Args:
        weight: float32 [R, D].
        indices: int64 [N].
        offsets: int64 [G + 1], from 0 to N, never decreasing.
        per_lookup_weights: float32 [N], or None for ones.

    Returns:
        float32 [G, D]; zeros for an empty bag.
    """
    return foreach_bag_sum([weight], [indices], [offsets], [per_lookup_weights])[0]


def foreach_bag_sum(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    per_lookup_weights: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`bag_sum` of several tables."""
    if not weights:
        return []
    sums: list[Tensor] = _lazydp.foreach_bag_sum(weights, indices, offsets, _or_ones(per_lookup_weights, weights))
    return sums


def catch_up_bag_sum_(
    weight: Tensor,
    last: Tensor,
    groups: RowGroups,
    key: Tensor,
    indices: Tensor,
    offsets: Tensor,
    bag_of_lookup: Tensor,
    *,
    table: int,
    step: int,
    transition: Tensor,
    factor: Tensor,
    momentum: Tensor | None = None,
    per_lookup_weights: Tensor | None = None,
    noise: Distribution = "gaussian",
    first_row: int = 0,
) -> Tensor:
    """`catch_up_` of the rows of `groups`, then `bag_sum` of the lookups they group, in one pass over the rows.

    (On the CPU that is one pass where most bags have one lookup.) `groups` and `bag_of_lookup`, int64 [N], must be
    what `group_rows` and `bag_ids` give for these lookups; of others the sums are not defined.

    Returns float32 [G, D]. For the arguments see the two operators.
    """
    return foreach_catch_up_bag_sum_(
        [weight],
        [last],
        [groups],
        key,
        [indices],
        [offsets],
        [bag_of_lookup],
        tables=[table],
        step=step,
        transition=transition,
        factor=factor,
        momenta=_listed(momentum),
        per_lookup_weights=[per_lookup_weights],
        noise=noise,
        first_rows=[first_row],
    )[0]


def foreach_catch_up_bag_sum_(
    weights: Sequence[Tensor],
    last: Sequence[Tensor],
    groups: Sequence[RowGroups],
    key: Tensor,
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    bag_of_lookup: Sequence[Tensor],
    *,
    tables: Sequence[int],
    step: int,
    transition: Tensor,
    factor: Tensor,
    momenta: Sequence[Tensor] | None = None,
    per_lookup_weights: Sequence[Tensor | None] | None = None,
    noise: Distribution = "gaussian",
    first_rows: Sequence[int] | None = None,
) -> list[Tensor]:
    """`catch_up_bag_sum_` of several tables; what must differ between them says `foreach_catch_up_`."""
    if not weights:
        return []
    _refuse_several_devices(weights)
    sums = [_room_for_sums(weight, ends) for weight, ends in zip(weights, offsets, strict=True)]
    _lazydp.foreach_catch_up_bag_sum_(
        weights,
        last,
        *_parts(groups),
        key,
        tables,
        _or_zeros(first_rows, weights),
        step,
        transition,
        factor,
        momenta or [],
        _is_ones(noise),
        indices,
        offsets,
        bag_of_lookup,
        _or_ones(per_lookup_weights, weights),
        sums,
    )
    return sums


def bag_sq_norms(indices: Tensor, offsets: Tensor, grad: Tensor, per_lookup_weights: Tensor | None = None) -> Tensor:
    """Squared norms of the gradients that single examples send to one table.

    F features read the table. Example i contributes bag g = f B + i of each feature f, with output gradient
    grad[f, i]. Its gradient in row r is the sum over f of (sum of the weights of r's lookups in bag f B + i)
    times grad[f, i]: equal rows add up over all features before the norm is taken.

    Args:
        indices: int64 [N].
        offsets: int64 [F B + 1], from 0 to N, never decreasing, feature-major.
        grad: float32 [F, B, D].
        per_lookup_weights: float32 [N], or None for ones.

    Never below the norm of what `scatter_add_` with a bound adds for the example: what float64 may have rounded away
    is added, and where terms w_i grad cancel, 2^-12 of the largest of them is left.

    Returns:
        float64 [B].
    """
    return foreach_bag_sq_norms([indices], [offsets], [grad], [per_lookup_weights])


def foreach_bag_sq_norms(
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    grads: Sequence[Tensor],
    per_lookup_weights: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Squared norms of what single examples send to all of several tables: the sum of `bag_sq_norms` over them.

    Tables may differ in F and D, not in B; there must be one at least.

    Returns:
        float64 [B].
    """
    if not grads:
        raise ValueError("grads: expected one table at least, found none")
    norms: Tensor = _lazydp.foreach_bag_sq_norms(indices, offsets, grads, _or_ones(per_lookup_weights, grads))
    return norms


def scatter_add_(
    weight: Tensor,
    groups: RowGroups,
    bag_of_lookup: Tensor,
    grad: Tensor,
    scale: Tensor,
    *,
    alpha: float,
    per_lookup_weights: Tensor | None = None,
    bound: float | None = None,
) -> None:
    """weight[r] += alpha * sum over lookups j of row r of  w_j scale[bag_of_lookup[j]] grad[bag_of_lookup[j]].

    One owner per row and a fixed order of addition: deterministic, no atomics.

    With a `bound` the sum is exact: every term is formed in float64 and rounded once to a multiple of
    `exact_grid(bound)`, so that what one term adds depends neither on the other terms nor on their order, and the bits
    are the same on every device. The sum is then multiplied by alpha and added to the row in float64, and rounded once.
    (A row with one lookup needs no sum: it is float32.) Without a bound everything is float32.

    Args:
        weight: float32 [R, D].
        groups: of the N lookups.
        bag_of_lookup: int64 [N] (see `bag_ids`).
        grad: float32 [G, D], gradient of each bag's sum.
        scale: float32 [G], each bag's clipping factor.
        alpha: common factor, such as -learning_rate / expected_batch_size.
        per_lookup_weights: float32 [N], or None for ones.
        bound: what the terms of one privacy unit add up to at most, in norm; no term may exceed 2^12 bounds, and fewer
            than 2^24 units may send one bound each (`bag_sq_norms` and the clipping that follows see to the first).
    """
    foreach_scatter_add_(
        [weight],
        [groups],
        [bag_of_lookup],
        [grad],
        [scale],
        alpha=alpha,
        per_lookup_weights=[per_lookup_weights],
        bound=bound,
    )


def foreach_scatter_add_(
    weights: Sequence[Tensor],
    groups: Sequence[RowGroups],
    bag_of_lookup: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    alpha: float,
    per_lookup_weights: Sequence[Tensor | None] | None = None,
    bound: float | None = None,
) -> None:
    """`scatter_add_` of several tables, all different, with one `alpha` and one `bound`."""
    if not weights:
        return
    _refuse_several_devices(weights)
    _lazydp.foreach_scatter_add_(
        weights,
        *_parts(groups),
        bag_of_lookup,
        grads,
        scales,
        alpha,
        _or_ones(per_lookup_weights, weights),
        0.0 if bound is None else exact_grid(bound),
    )


def bag_ids(offsets: Tensor, *, num_lookups: int | None = None) -> Tensor:
    """The bag of every lookup: int64 [N] from offsets, int64 [G + 1] from 0 to N, never decreasing.

    On a device other than the CPU the host waits unless it is given N (`num_lookups`); offsets that contradict it are
    then an error of the device.
    """
    if offsets.is_cpu:
        return foreach_bag_ids([offsets])[0]
    lengths = offsets.diff()
    if offsets.numel() < 1 or (num_lookups is None and (lengths < 0).any()):
        raise ValueError("offsets: expected at least one entry, and none below the one before")
    return torch.repeat_interleave(lengths, output_size=num_lookups)


def foreach_bag_ids(offsets: Sequence[Tensor], *, num_lookups: Sequence[int | None] | None = None) -> list[Tensor]:
    """`bag_ids` of the lookups of several tables, all on one device."""
    if not offsets:
        return []
    if offsets[0].is_cpu:
        ids: list[Tensor] = _lazydp.foreach_bag_ids(offsets)
        return ids
    counts = num_lookups if num_lookups is not None else [None] * len(offsets)
    return [bag_ids(some, num_lookups=count) for some, count in zip(offsets, counts, strict=True)]


def chacha_words(key: Tensor, *, stream: int, counter: int, n: int) -> Tensor:
    """The first n 32-bit words of keystream `stream` from block `counter` on (16 words a block), as int32 [n].

    Their bits are uniform; read them as unsigned with `.numpy().view(numpy.uint32)`. Keystreams never meet the noise:
    a table number is kept for them. stream: 0 <= stream < 2^63, for a sampler its step.
    """
    result: Tensor = _lazydp.chacha_words(key, stream, counter, n)
    return result


def chacha20_blocks(inputs: Tensor) -> Tensor:
    """The ChaCha20 block function (RFC 8439, section 2.3) on int32 [n, 16], constants included; int32 [n, 16].

    The first half of a draw, by itself, so that it can be tested against the RFC.
    """
    result: Tensor = _lazydp.chacha20_blocks(inputs)
    return result


def normals_of_blocks(words: Tensor) -> Tensor:
    """The twelve standard normals of each sixteen words: int32 [n, 16] -> float32 [n, 12].

    The second half of a draw, by itself, so that it can be tested on words that chance would not bring.
    """
    result: Tensor = _lazydp.normals_of_blocks(words)
    return result


def built_with_cuda() -> bool:
    """Whether the operators take tensors on an NVIDIA GPU: the extension was built with CUDA."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("lazydp::foreach_bag_sum", "CUDA"))


def simd_levels() -> tuple[SimdLevel, ...]:
    """The instruction sets whose kernels this machine runs, slowest first.

    All give the same bits, except that `amx` has its own order of additions in `products.weighted_product_`.
    """
    return _SIMD_LEVELS[: _lazydp.best_simd_level() + 1]


def simd_level() -> SimdLevel:
    """The instruction set in use: the best, unless the environment's LAZYDP_SIMD or `set_simd_level` chose another."""
    level: int = _lazydp.simd_level()
    return _SIMD_LEVELS[level]


def set_simd_level(level: SimdLevel) -> None:
    """Uses the kernels of another instruction set, in the whole process. For tests and benchmarks.

    Raises ValueError unless `level` is one of `simd_levels()`.
    """
    if level not in simd_levels():
        raise ValueError(f"level: expected one of {', '.join(simd_levels())}, found {level!r}")
    _lazydp.set_simd_level(_SIMD_LEVELS.index(level))


def _listed(momentum: Tensor | None) -> Sequence[Tensor] | None:
    return None if momentum is None else [momentum]


def _refuse_several_devices(weights: Sequence[Tensor]) -> None:
    """Torch would choose one device's operator for all of them; that of meta tensors does nothing at all."""
    devices = {weight.device for weight in weights}
    if len(devices) > 1:
        raise ValueError(f"weights: expected all on one device, found them on {', '.join(sorted(map(str, devices)))}")


def _room_for_sums(weight: Tensor, offsets: Tensor) -> Tensor:
    """[G, D]; of any size where weight or offsets are not what they should be: the operator says what is wrong."""
    return weight.new_empty(max(0, offsets.numel() - 1), weight.shape[-1] if weight.dim() else 0)


def _parts(groups: Sequence[RowGroups]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [group.rows for group in groups], [group.order for group in groups], [group.starts for group in groups]


def _or_ones(per_lookup_weights: Sequence[Tensor | None] | None, tables: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return [None] * len(tables) if per_lookup_weights is None else per_lookup_weights


def _or_zeros(first_rows: Sequence[int] | None, tables: Sequence[Tensor]) -> Sequence[int]:
    return [0] * len(tables) if first_rows is None else first_rows


def _is_ones(noise: Distribution) -> bool:
    if noise not in ("gaussian", "ones"):
        raise ValueError(f"noise: expected 'gaussian' or 'ones', found {noise!r}")
    return noise == "ones"
