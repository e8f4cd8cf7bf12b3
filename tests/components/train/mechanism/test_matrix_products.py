"""Products with bare matrices: norms and sums without a copy for each example, against autograd, one at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism.capture import Capture
from lazydp.components.train.mechanism.double_sums import DoubleSums
from lazydp.components.train.mechanism.layers import trained_layers
from lazydp.components.train.mechanism.units import Units

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, LENGTH, DIM = 4, 6, 5

Forward = Callable[[Tensor, Tensor], Tensor]
"""Outputs [B, ...] of inputs [B, L, D] and a weight."""


class Using(nn.Module):
    """A bare weight, used in one way."""

    def __init__(self, shape: tuple[int, ...], forward: Forward) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.way = forward

    def forward(self, inputs: Tensor) -> Tensor:
        return self.way(inputs, self.weight)


def split_rows(x: Tensor, w: Tensor) -> Tensor:
    first, second = w.split([2, DIM])
    return functional.linear(x, first).sum(dim=2, keepdim=True) + functional.linear(x.tanh(), second)


def gates(x: Tensor, w: Tensor) -> Tensor:
    return sum((functional.linear(x.sin(), part) for part in w.chunk(3)), start=torch.zeros(()))


KEPT: dict[str, tuple[tuple[int, ...], Forward]] = {
    "x @ W": ((DIM, 3), lambda x, w: x @ w),
    "a vector @ W": ((DIM, 3), lambda x, w: x[:, 0] @ w),
    "W @ x": ((3, LENGTH), lambda x, w: w @ x),
    "W @ columns": ((3, DIM), lambda x, w: torch.matmul(w, x.mT)),
    "a column": ((DIM, DIM), lambda x, w: w @ x[:, 0].unsqueeze(2)),
    "x @ W.t()": ((3, DIM), lambda x, w: x @ w.t()),
    "x @ W.T": ((3, DIM), lambda x, w: x @ w.T),
    "W.mT @ x": ((LENGTH, 3), lambda x, w: w.mT @ x),
    "transposed": ((3, DIM), lambda x, w: x @ w.transpose(-1, -2)),
    "twice transposed": ((DIM, 3), lambda x, w: x @ w.t().t()),
    "twice": ((DIM, DIM), lambda x, w: torch.tanh(x @ w) @ w.t() + (w @ x.mT).mT),
    "linear": ((3, DIM), functional.linear),
    "linear of a transposed": ((DIM, 3), lambda x, w: functional.linear(input=x, weight=w.t())),
    "rows": ((2 + DIM, DIM), split_rows),
    "gates": ((12, DIM), gates),
    "many positions": ((2, 2), lambda x, w: x[:, :, :2] @ w),
    "conv1d": ((3, LENGTH, 2), lambda x, w: functional.conv1d(x, w, stride=2, padding=1)),
    "conv1d of width 1": ((3, DIM, 1), lambda x, w: functional.conv1d(x.transpose(1, 2), w)),
    "conv2d": ((3, 1, 2, DIM), lambda x, w: functional.conv2d(x.unsqueeze(1), w, dilation=(2, 1), padding=(1, 0))),
}
FORMED: dict[str, tuple[tuple[int, ...], Forward]] = {
    "also by itself": ((DIM, DIM), lambda x, w: x @ w + w[0]),
    "of itself": ((DIM, DIM), lambda x, w: x @ (w @ w)),
    "einsum": ((DIM, 3), lambda x, w: torch.einsum("bld,de->ble", x, w)),
    "a row": ((DIM, 3), lambda x, w: x * w[:, 0]),
    "groups": ((LENGTH, 1, 2), lambda x, w: functional.conv1d(x, w, groups=LENGTH)),
    "both dimensions exchanged and added": ((DIM, DIM), lambda x, w: x @ (w + w.t())),
}
OVERLAPPING = ((DIM, DIM), lambda x, w: functional.linear(x, w.split([2, 3])[0]).sum(2, True) + x @ w)


def alone(model: Using, inputs: Tensor) -> Tensor:
    """The gradient of each example's loss, [B, ...]."""
    return torch.stack([torch.autograd.grad(loss(model(x[None])).sum(), model.weight)[0] for x in inputs])


def loss(outputs: Tensor) -> Tensor:
    return outputs.flatten(1).square().mul(torch.linspace(0.5, 1.5, outputs[0].numel())).sum(dim=1)


def captured(model: Using, inputs: Tensor, units: Units) -> tuple[Tensor, Tensor, bool]:
    """Squared norms, the weighted sum, and whether a gradient was formed by autograd."""
    sums = DoubleSums()
    with Capture(trained_layers(model), sums=sums) as capture:
        loss(model(inputs)).sum().backward()
    leaf = capture._copies.found(model.weight)
    assert leaf is not None
    sq_norms = capture.sq_norms(units)
    capture.add_weighted(units.per_example(torch.linspace(0.1, 1.0, units.count)))
    return sq_norms, sums.of(model.weight), leaf.grad is not None


ALL = {**KEPT, **FORMED, "overlapping rows": OVERLAPPING}


@pytest.mark.parametrize("sizes", [[1] * SIZE, [3, 1]])
@pytest.mark.parametrize("name", ALL)
def test_norms_and_sums_are_those_of_autograd(name: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model, inputs = Using(*ALL[name]), torch.randn(SIZE, LENGTH, DIM)
    units = Units(torch.tensor(sizes))
    gradients = torch.stack([part.sum(dim=0) for part in alone(model, inputs).double().split(sizes)])
    true = gradients.flatten(1).square().sum(dim=1)
    sq_norms, total, formed = captured(model, inputs, units)
    torch.testing.assert_close(sq_norms, true, rtol=1e-3, atol=1e-7)
    assert bool((sq_norms >= true * (1 - 1e-5)).all())
    expected = torch.einsum("u,u...->...", torch.linspace(0.1, 1.0, units.count).double(), gradients)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    assert formed == (name in FORMED)


def test_a_change_in_place_of_what_was_multiplied_is_refused() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        hidden = x * 1.0
        found = hidden @ w
        hidden += 1.0
        return found

    model = Using((DIM, 3), forward)
    with Capture(trained_layers(model)) as capture:
        loss(model(torch.randn(SIZE, LENGTH, DIM))).sum().backward()
    with pytest.raises(InputError, match="modified in place what it had multiplied"):
        capture.sq_norms(Units.examples(SIZE))
