"""The slow path: per-example gradients of any module, against autograd, one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism.capture import Capture
from lazydp.components.train.mechanism.double_sums import DoubleSums
from lazydp.components.train.mechanism.layers import slow_paths, trained_layers
from lazydp.components.train.mechanism.units import Units

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, LENGTH, DIM = 5, 3, 4


class Bare(nn.Module):
    """Parameters of every kind used by the model itself, around layers that have rules, changed in place between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.bias = nn.Parameter(torch.randn(()))
        self.cross = nn.ParameterList([torch.randn(DIM, DIM) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": torch.randn(DIM)})
        self.positions = nn.Parameter(torch.randn(1, LENGTH, DIM))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.layer(inputs)
        hidden += self.positions
        for weight in self.cross:
            hidden = torch.tanh(hidden @ weight)
        self.layer(self.positions)  # of no example, and used for nothing
        return self.norm(self.layer(hidden)) * self.named["scale"] + self.bias


class Attention(nn.Module):
    """Masked self-attention, in either layout, its weights used or not."""

    def __init__(self, *, batch_first: bool, weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=batch_first, **options)
        self.weights = weights

    def forward(self, inputs: Tensor) -> Tensor:
        causal = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
        padding = torch.zeros(inputs.shape[:2], dtype=torch.bool).index_fill(1, torch.tensor(2), True)
        first = inputs if self.attention.batch_first else inputs.transpose(0, 1)
        found, weights = self.attention(
            first, first, value=first, attn_mask=causal, key_padding_mask=padding, need_weights=self.weights
        )
        found = found if self.attention.batch_first else found.transpose(0, 1)
        return found if weights is None else torch.cat([found, weights], dim=2)


class Recurrent(nn.Module):
    """Outputs and last states, from zeros and from given states."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.layer = kind(DIM, 3, batch_first=True, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, states = self.layer(inputs)
        outputs, again = self.layer(inputs.flip(1), states)
        last = [*states, *again] if isinstance(states, tuple) else [states, again]
        return torch.cat([outputs.flatten(1), *(state.transpose(0, 1).flatten(1) for state in last)], dim=1)


class Twice(nn.Module):
    """A slow module inside another one, and called by itself; an argument by keyword, and a dict back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.outer = Outer(self.inner)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(self.outer(more={"x": inputs})["found"]) + self.outer(more={"x": inputs * 2})["found"]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.sin(inputs * self.weight)


class Outer(nn.Module):
    def __init__(self, inner: Inner) -> None:
        super().__init__()
        self.inner = inner
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, *, more: dict[str, Tensor]) -> dict[str, Any]:
        return {"found": self.inner(more["x"]) + self.bias, "what": "a name"}


SEQUENCE = (LENGTH, DIM)
IMAGE = (4, 5, 5)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bare parameters": (Bare, SEQUENCE),
    "one inside another": (Twice, SEQUENCE),
    "attention": (lambda: Attention(batch_first=True, weights=False), SEQUENCE),
    "attention, weights used": (lambda: Attention(batch_first=True, weights=True, bias=False), SEQUENCE),
    "attention, positions first": (lambda: Attention(batch_first=False, weights=True, add_bias_kv=False), SEQUENCE),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(DIM, 2, 6, 0.0, batch_first=True), SEQUENCE),
    "encoder, normalised first": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(DIM, 2, 6, 0.0, batch_first=True, norm_first=True, activation="gelu"),
            2,
            enable_nested_tensor=False,
        ),
        SEQUENCE,
    ),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "gru, two layers both ways": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2), SEQUENCE),
    "lstm both ways": (lambda: Recurrent(nn.LSTM, bidirectional=True), SEQUENCE),
    "conv1d": (lambda: nn.Conv1d(LENGTH, 6, 2, stride=2), SEQUENCE),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), IMAGE),
    "conv2d, groups": (lambda: nn.Conv2d(4, 4, 2, groups=2, dilation=2), IMAGE),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(inplace=True)), IMAGE),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "rms norm": (lambda: nn.RMSNorm(DIM), SEQUENCE),
    "prelu": (lambda: nn.PReLU(LENGTH), SEQUENCE),
}


def one_at_a_time(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for example in inputs.split(1):
        gradients = torch.autograd.grad(model(example).square().sum(), list(model.parameters()))
        for name, gradient in zip(found, gradients, strict=True):
            found[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in found.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_norms_and_sums_are_those_of_autograd(name: str, training: bool) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, inputs, scale = make().train(training), torch.randn(SIZE, *shape), torch.rand(SIZE)
    layers = trained_layers(model)
    assert slow_paths(layers)
    expected = one_at_a_time(model, inputs)
    plain = model(inputs)
    sums = DoubleSums()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Capture(layers, sums=sums) as capture:
        outputs = model(inputs)
        outputs.square().sum().backward()
    torch.testing.assert_close(outputs, plain, rtol=1e-4, atol=1e-5)
    squares = sum(gradient.double().reshape(SIZE, -1).square().sum(dim=1) for gradient in expected.values())
    torch.testing.assert_close(capture.sq_norms(Units.examples(SIZE)), squares, rtol=1e-4, atol=1e-8)
    capture.add_weighted(scale)
    for key, parameter in model.named_parameters():
        exact = sums.used(parameter)
        assert parameter.grad is not None
        found = parameter.grad if exact is None else exact.float() + parameter.grad
        torch.testing.assert_close(found, torch.einsum("b,b...->...", scale, expected[key]), rtol=1e-3, atol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["bare parameters", "attention", "lstm", "conv2d"])
def test_examples_of_a_unit_add_up_before_the_norm(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, inputs, sizes = make(), torch.randn(SIZE, *shape), [2, 1, 2]
    expected = one_at_a_time(model, inputs)
    with Capture(trained_layers(model)) as capture:
        model(inputs).square().sum().backward()
    total = torch.zeros(3, dtype=torch.float64)
    for gradients in expected.values():
        joined = torch.stack([part.sum(dim=0) for part in gradients.double().split(sizes)])
        total += joined.reshape(3, -1).square().sum(dim=1)
    torch.testing.assert_close(capture.sq_norms(Units(torch.tensor(sizes))), total, rtol=1e-4, atol=1e-8)


def test_a_formed_norm_is_no_less_than_what_is_added() -> None:
    """The rounding of a norm would let a unit pass its bound; terms of all sizes, as the gradients of a bias."""
    torch.manual_seed(0)
    for magnitude in (1e-30, 1e-12, 1.0, 1e15):
        model = Inner()
        inputs = torch.ones(50, 700, DIM)
        factors = torch.randn(50, 700, 1) * magnitude
        with Capture(trained_layers(model)) as capture:
            (model(inputs) * factors).sum().backward()
        (pair,) = capture._formed[0].pairs(50)
        true = pair.grads.double().flatten(1).square().sum(dim=1)
        assert bool((capture.sq_norms(Units.examples(50)) >= true * (1 - 1e-14)).all())


def test_a_mask_over_positions_stays_one_where_the_batch_is_as_long() -> None:
    """With as many examples as positions nothing in a call tells the two apart: the calls before do."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(DIM))

        def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
            return mask @ (inputs * self.weight)

    torch.manual_seed(0)
    model, mask = Masked(), torch.randn(LENGTH, LENGTH)
    layers = trained_layers(model)
    for size in (2, LENGTH):
        inputs = torch.randn(size, LENGTH, DIM)
        with Capture(layers):
            torch.testing.assert_close(model(inputs, mask), mask @ (inputs * model.weight))


class Refused(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs + self.bias
        if self.how == "a branch on values":
            return hidden if hidden.sum() > 0 else -hidden
        if self.how == "a reduction":
            return hidden.mean()
        return hidden


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a branch on values", r"the model itself.*bias.*module of its own.*without \.item\(\)"),
        ("a reduction", r"gave \[\] for one example: .*bias is on the slow path.*without a reduction"),
    ],
)
def test_what_cannot_run_example_by_example_is_refused(how: str, message: str) -> None:
    model = Refused(how)
    layers = trained_layers(model)
    with pytest.raises(InputError, match=message), Capture(layers):
        model(torch.randn(SIZE, LENGTH, DIM))
    with Capture(layers):  # whole again
        model.how = ""
        model(torch.randn(SIZE, LENGTH, DIM))


def test_calls_of_other_sizes_and_without_tensors_are_refused() -> None:
    model = Inner()
    with Capture(trained_layers(model)):
        model(torch.randn(SIZE, DIM))
        with pytest.raises(InputError, match=r"called with 5 examples and with 2 in one micro-batch"):
            model(torch.randn(2, DIM))
        with pytest.raises(InputError, match=r"called without a tensor \[B, ...\]"):
            model(1.0)
    attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
    hidden, mask = torch.randn(SIZE, LENGTH, DIM), torch.zeros(2 * SIZE, LENGTH, LENGTH)
    recurrent = nn.Sequential(nn.GRU(DIM, DIM, batch_first=True))
    packed = nn.utils.rnn.pack_sequence([torch.randn(2, DIM), torch.randn(1, DIM)])
    with Capture(trained_layers(attention)), pytest.raises(InputError, match=r"attn_mask \[L, S\].*key_padding_mask"):
        attention(hidden, hidden, hidden, attn_mask=mask)
    with Capture(trained_layers(recurrent)), pytest.raises(InputError, match=r"'0' \(GRU\): expected .* \[B, L, D\]"):
        recurrent(packed)


def test_half_precision_is_refused() -> None:
    for model in (nn.Sequential(nn.Linear(DIM, DIM)), nn.Sequential(Inner())):
        with Capture(trained_layers(model)), pytest.raises(InputError, match="float32"), torch.autocast("cpu"):
            model(torch.randn(SIZE, DIM))
