"""The operators of `ops` in plain torch and numpy, same names and signatures: the oracle that the fast ones must match.

Nothing here shares code with the C++: ChaCha20 is written from RFC 8439, Box-Muller with numpy's own log, cos and sin
in float64. Written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazydp.kernels.arguments import Distribution, RowGroups, exact_grid

Words = npt.NDArray[np.uint32]

NORMALS_PER_BLOCK = 12
KEYSTREAM_TABLE = 0xFFFF
_SECOND_NORMAL = 0x80000000
_SIGMA = np.frombuffer(b"expand 32-byte k", dtype="<u4")


def chacha20_block(state: Words) -> Words:
    """RFC 8439, section 2.3: the block function on inputs uint32 [..., 16]; returns uint32 [..., 16]."""
    x = [state[..., i].copy() for i in range(16)]

    def rotate(value: Words, bits: int) -> Words:
        return (value << np.uint32(bits)) | (value >> np.uint32(32 - bits))

    def quarter(a: int, b: int, c: int, d: int) -> None:
        x[a] += x[b]
        x[d] = rotate(x[d] ^ x[a], 16)
        x[c] += x[d]
        x[b] = rotate(x[b] ^ x[c], 12)
        x[a] += x[b]
        x[d] = rotate(x[d] ^ x[a], 8)
        x[c] += x[d]
        x[b] = rotate(x[b] ^ x[c], 7)

    with np.errstate(over="ignore"):
        for _ in range(10):
            for i in range(4):
                quarter(i, 4 + i, 8 + i, 12 + i)
            for i in range(4):
                quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
        return np.stack(x, axis=-1) + state


def normals_of_block(words: Words) -> npt.NDArray[np.float64]:
    """Twelve standard normals, [..., 12], from each sixteen words, [..., 16] (format: csrc/common/gaussian.h)."""
    low = words[..., 12:16].astype(np.int64)
    fine = [low[..., p] >> 10 | 1 for p in range(4)]
    fine += [((low[..., p] << 11) ^ (low[..., p + 1] & 0x7FF)) & 0x3FFFFF | 1 for p in (0, 2)]
    pairs = []
    for p in range(6):
        angle = words[..., p].astype(np.int32).astype(np.float64)
        radius = words[..., 6 + p].astype(np.int32).astype(np.int64)
        distance = np.where(radius < 0, ~radius, radius)
        y = (distance + fine[p] * 2.0**-22) * 2.0**-32
        log_u = np.where(radius < 0, np.log1p(-y), np.log(y))
        phi = angle * (np.pi / 2**32)
        half_plane = np.where(words[..., p] & np.uint32(1), -1.0, 1.0)
        length = np.sqrt(-2.0 * log_u)
        pairs += [length * np.cos(phi) * half_plane, length * np.sin(phi)]
    return np.stack(pairs, axis=-1)


def noise_words(key: Tensor, *, table: int, rows: Tensor, step: int, blocks: int, first_block: int = 0) -> Words:
    """The blocks that the noise of (table, row, step) comes from: uint32 [len(rows), blocks, 16]."""
    row = rows.numpy().astype(np.uint64)
    state = np.zeros((len(row), blocks, 16), dtype=np.uint32)
    state[..., 0:4] = _SIGMA
    state[..., 4:12] = _key_words(key)
    state[..., 12] = np.arange(first_block, first_block + blocks, dtype=np.uint64).astype(np.uint32)
    state[..., 13] = step
    state[..., 14] = (row & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None]
    state[..., 15] = ((np.uint64(table) << np.uint64(16)) | (row >> np.uint64(32))).astype(np.uint32)[:, None]
    return chacha20_block(state)


def noise(key: Tensor, *, table: int, rows: Tensor, step: int, columns: int, second: bool = False) -> Tensor:
    """The noise of the given rows, float64 [len(rows), columns]; `second`: the second normal of each element."""
    blocks = -(-columns // NORMALS_PER_BLOCK)
    first_block = _SECOND_NORMAL if second else 0
    words = noise_words(key, table=table, rows=rows, step=step, blocks=blocks, first_block=first_block)
    normals = normals_of_block(words).reshape(len(rows), blocks * NORMALS_PER_BLOCK)
    return torch.from_numpy(normals[:, :columns].copy())


def normal_(out: Tensor, key: Tensor, *, table: int, first_row: int, step: int) -> Tensor:
    """See `ops.normal_`."""
    rows = torch.arange(first_row, first_row + out.shape[0])
    return out.copy_(noise(key, table=table, rows=rows, step=step, columns=out.shape[1]))


def group_rows(indices: Tensor, *, num_rows: int) -> RowGroups:
    """See `ops.group_rows`."""
    _check_range("indices", indices, num_rows)
    ordered, order = torch.sort(indices, stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return RowGroups(rows, order, starts)


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
    """See `ops.catch_up_`."""
    _check_range("rows", rows, weight.shape[0])
    if (last[rows] > step).any():
        raise ValueError(f"last: expected last <= step {step}")
    rows = rows[last[rows] < step]
    from_step = last[rows].long()
    if (from_step >= transition.shape[0]).any():
        raise ValueError(f"transition: there are only {transition.shape[0]} starting steps")
    m, chol = transition[from_step].double(), factor[from_step].double()
    z1 = _draw(noise, key, table=table, rows=first_row + rows, step=step, columns=weight.shape[1], second=False)
    w = weight[rows].double()
    if momentum is None:
        weight[rows] = (m[:, :1] * w + chol[:, :1] * z1).float()
    else:
        z2 = _draw(noise, key, table=table, rows=first_row + rows, step=step, columns=weight.shape[1], second=True)
        v = momentum[rows].double()
        weight[rows] = (m[:, 0:1] * w + m[:, 1:2] * v + chol[:, 0:1] * z1).float()
        momentum[rows] = (m[:, 2:3] * w + m[:, 3:4] * v + chol[:, 1:2] * z1 + chol[:, 2:3] * z2).float()
    last[rows] = step


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
    """See `ops.flush_`."""
    rows = torch.arange(weight.shape[0])
    catch_up_(
        weight,
        last,
        rows,
        key,
        table=table,
        step=step,
        transition=transition,
        factor=factor,
        momentum=momentum,
        noise=noise,
        first_row=first_row,
    )


def bag_sum(weight: Tensor, indices: Tensor, offsets: Tensor, per_lookup_weights: Tensor | None = None) -> Tensor:
    """See `ops.bag_sum`."""
    _check_range("indices", indices, weight.shape[0])
    values = weight[indices].double()
    if per_lookup_weights is not None:
        values = values * per_lookup_weights[:, None].double()
    out = torch.zeros(offsets.numel() - 1, weight.shape[1], dtype=torch.float64)
    return out.index_add_(0, bag_ids(offsets), values).float()


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
    """See `ops.catch_up_bag_sum_`."""
    assert torch.equal(bag_of_lookup, bag_ids(offsets))
    catch_up_(
        weight,
        last,
        groups.rows,
        key,
        table=table,
        step=step,
        transition=transition,
        factor=factor,
        momentum=momentum,
        noise=noise,
        first_row=first_row,
    )
    return bag_sum(weight, indices, offsets, per_lookup_weights)


def bag_sq_norms(indices: Tensor, offsets: Tensor, grad: Tensor, per_lookup_weights: Tensor | None = None) -> Tensor:
    """See `ops.bag_sq_norms`."""
    _, examples, columns = grad.shape
    bags = bag_ids(offsets)
    weights = torch.ones(indices.numel()) if per_lookup_weights is None else per_lookup_weights
    out = torch.zeros(examples, dtype=torch.float64)
    for i in range(examples):
        of_example = bags % examples == i
        distinct, position = torch.unique(indices[of_example], return_inverse=True)
        rows = torch.zeros(distinct.numel(), columns, dtype=torch.float64)
        sent = weights[of_example, None].double() * grad[bags[of_example] // examples, i].double()
        largest = sent.abs().max() if sent.numel() else sent.new_zeros(())
        out[i] = torch.maximum(rows.index_add_(0, position, sent).square().sum(), (largest / 4096).square())
    return out


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
    """See `ops.scatter_add_`."""
    factor = scale[bag_of_lookup, None].double()
    if per_lookup_weights is not None:
        factor = factor * per_lookup_weights[:, None].double()
    sent = factor * grad[bag_of_lookup].double()
    if bound is not None:
        plain = _add_single_terms_(weight, groups, bag_of_lookup, grad, factor, alpha=alpha)
        sent = (sent / exact_grid(bound)).round().to(torch.int64)
        sent[plain] = 0
    group_of_sorted = torch.repeat_interleave(torch.arange(groups.rows.numel()), groups.starts.diff())
    sums = torch.zeros(groups.rows.numel(), weight.shape[1], dtype=sent.dtype)
    sums.index_add_(0, group_of_sorted, sent[groups.order])
    step = alpha if bound is None else alpha * exact_grid(bound)
    weight[groups.rows] = (weight[groups.rows].double() + step * sums.double()).float()


def _add_single_terms_(
    weight: Tensor, groups: RowGroups, bag_of_lookup: Tensor, grad: Tensor, factor: Tensor, *, alpha: float
) -> Tensor:
    """Add sums of one term, which are float32 throughout; the lookups [n] that they were."""
    single = groups.starts.diff() == 1
    lookups = groups.order[groups.starts[:-1][single]]
    factors = factor[lookups].float()
    normal = (factors.abs() >= torch.finfo(torch.float32).tiny).squeeze(1) & factors.isfinite().squeeze(1)
    rows, lookups = groups.rows[single][normal], lookups[normal]
    weight[rows] += torch.tensor(alpha, dtype=torch.float32) * (factors[normal] * grad[bag_of_lookup[lookups]])
    return lookups


def bag_ids(offsets: Tensor, *, num_lookups: int | None = None) -> Tensor:
    """See `ops.bag_ids`."""
    del num_lookups  # nobody waits here
    return torch.tensor([g for g, n in enumerate(offsets.diff().tolist()) for _ in range(n)], dtype=torch.int64)


def weighted_product_(
    out: Tensor,
    grads: Tensor,
    inputs: Tensor,
    scale: Tensor,
    *,
    order: Tensor | None = None,
    block: int = 64,
    overwrite: bool = False,
    amx: bool = False,
) -> None:
    """See `products.weighted_product_`; `amx`: as at the level of that name."""
    if overwrite:
        out.zero_()
    places = torch.arange(grads.shape[0]) if order is None else order
    scaled = scale.unsqueeze(1) * grads
    scaled = torch.where(scaled.abs() < _LEAST_NORMAL, 0.0, scaled)
    for units in torch.split(places, block):
        if amx and block >= _LEAST_AMX_BLOCK:
            out += torch.from_numpy(_in_parts(scaled[units].numpy(), inputs[units].numpy()))
            continue
        chain = np.zeros(out.shape, dtype=np.float32)
        for unit in units.tolist():
            chain = _fused_multiply_add(scaled[unit, :, None].numpy(), inputs[unit].numpy(), chain)
        out += torch.from_numpy(chain)


_LEAST_NORMAL = torch.finfo(torch.float32).tiny
_LEAST_AMX_BLOCK = 16
_AMX_GROUP = 32
_AMX_PRODUCTS = ((2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0))  # parts of grads and inputs: 0 is the high one


def _in_parts(grads: npt.NDArray[np.float32], inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The sum of one block on AMX; `weighted_products_amx.h` has the order of additions."""
    total = np.zeros((grads.shape[1], inputs.shape[1]), dtype=np.float32)
    for first in range(0, len(grads), _AMX_GROUP):
        group = slice(first, first + _AMX_GROUP)
        rows, columns = _parts(grads[group]), _parts(inputs[group])
        for of_rows, of_columns in _AMX_PRODUCTS:
            chains = [np.zeros_like(total), np.zeros_like(total)]
            for unit in range(rows[0].shape[0]):
                product = rows[of_rows][unit, :, None] * columns[of_columns][unit].astype(np.float64)  # exact
                chains[unit % 2] = _flushed((chains[unit % 2] + product).astype(np.float32))
            total = _flushed(total + _flushed(chains[0] + chains[1]))
    return total


def _parts(values: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    """Three bfloat16 numbers that add up to each value, cut towards 0; those below the least normal number are 0."""
    parts, rest = [], values.copy()
    for _ in range(3):
        parts.append((rest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
        rest = rest - parts[-1]
    return [_flushed(part) for part in parts]


def _flushed(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.where(np.abs(values) < _LEAST_NORMAL, np.copysign(np.float32(0.0), values), values)


def _fused_multiply_add(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], c: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """a b + c, rounded once. In float64 the product is exact; the sum is rounded to odd, so that rounding it again to
    float32 gives what rounding it once would (Boldo and Melquiond 2008)."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    fused: npt.NDArray[np.float32] = np.where((error != 0) & even, odd, total).astype(np.float32)
    return fused


def foreach_product_sq_norms(
    inputs: Sequence[Tensor], grads: Sequence[Tensor], *, weight: Sequence[bool], bias: Sequence[bool]
) -> Tensor:
    """See `products.foreach_product_sq_norms`; without the bound on the rounding."""
    of_inputs = [of_layer.double().square().sum(dim=1) for of_layer in inputs]
    of_grads = [of_layer.double().square().sum(dim=1) for of_layer in grads]
    factors = [a * with_weight + with_bias for a, with_weight, with_bias in zip(of_inputs, weight, bias, strict=True)]
    return torch.stack([e * factor for e, factor in zip(of_grads, factors, strict=True)]).sum(dim=0)


def weighted_sum_(out: Tensor, rows: Tensor, weights: Tensor) -> None:
    """See `products.weighted_sum_`."""
    for row, weight in zip(rows, weights, strict=True):
        out += weight * row.double()


def noised_sum_(out: Tensor, total: Tensor, noise: Tensor | None, *, scale: float) -> None:
    """See `products.noised_sum_`."""
    out.copy_(total if noise is None else total + scale * noise.double())


def chacha_words(key: Tensor, *, stream: int, counter: int, n: int) -> Tensor:
    """See `ops.chacha_words`."""
    blocks = -(-n // 16)
    state = np.zeros((blocks, 16), dtype=np.uint32)
    state[:, 0:4] = _SIGMA
    state[:, 4:12] = _key_words(key)
    state[:, 12] = np.arange(counter, counter + blocks, dtype=np.uint64).astype(np.uint32)
    state[:, 13] = stream & 0xFFFFFFFF
    state[:, 14] = stream >> 32
    state[:, 15] = KEYSTREAM_TABLE << 16
    return torch.from_numpy(chacha20_block(state).reshape(-1)[:n].view(np.int32).copy())


def _draw(
    distribution: Distribution, key: Tensor, *, table: int, rows: Tensor, step: int, columns: int, second: bool
) -> Tensor:
    if distribution == "ones":
        return torch.ones(rows.numel(), columns, dtype=torch.float64)
    return noise(key, table=table, rows=rows, step=step, columns=columns, second=second)


def _key_words(key: Tensor) -> Words:
    return np.frombuffer(key.numpy().tobytes(), dtype="<u4").astype(np.uint32)


def _check_range(name: str, indices: Tensor, num_rows: int) -> None:
    wrong = torch.nonzero((indices < 0) | (indices >= num_rows))
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(f"{name}[{at}]: expected 0 <= index < {num_rows}, found {int(indices[at])}")
