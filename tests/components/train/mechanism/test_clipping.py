"""One backward pass gives the norms and clipped sums that torch.func gives example by example."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism import norm_rules
from lazydp.components.train.mechanism.capture import Capture
from lazydp.components.train.mechanism.clip import clip_coefficients
from lazydp.components.train.mechanism.double_sums import DoubleSums
from lazydp.components.train.mechanism.layers import slow_paths, trained_layers
from lazydp.components.train.mechanism.norm_rules import FormedRule, LinearRule, NormRule, register_rule
from lazydp.components.train.mechanism.unit_order import ROUNDING
from lazydp.components.train.mechanism.units import Units

pytestmark = pytest.mark.usefixtures("one_thread")

Gradients = dict[str, Tensor]


def per_example(model: nn.Module, inputs: Tensor) -> Gradients:
    """Gradients [B, ...] of the sum of squares of each example's output, by torch.func."""

    def loss(weights: Gradients, one: Tensor) -> Tensor:
        return functional_call(model, weights, (one.unsqueeze(0),)).square().sum()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    result: Gradients = vmap(grad(loss), in_dims=(None, 0))(weights, inputs)
    return result


def captured(model: nn.Module, inputs: Tensor, scale: Tensor) -> tuple[Tensor, Gradients]:
    """Squared norms and scaled sums of the same loss, by one pass."""
    sums = DoubleSums()
    with Capture(trained_layers(model), sums=sums) as capture:
        model(inputs).square().sum().backward()
    sq_norms = capture.sq_norms(Units.examples(inputs.shape[0]))
    capture.add_weighted(scale)
    found = {name: sums.used(p) for name, p in model.named_parameters()}
    return sq_norms, {name: total.float() for name, total in found.items() if total is not None}


def check(model: nn.Module, inputs: Tensor) -> None:
    scale = torch.rand(inputs.shape[0], generator=torch.Generator().manual_seed(3))
    expected = per_example(model, inputs)
    sq_norms, sums = captured(model, inputs, scale)
    total = sum(g.flatten(1).double().square().sum(dim=1) for g in expected.values())
    torch.testing.assert_close(sq_norms.double(), total, rtol=2e-3, atol=1e-5)
    for name, gradients in expected.items():
        summed = torch.einsum("b,b...->...", scale, gradients)
        torch.testing.assert_close(sums[name], summed, rtol=1e-3, atol=1e-3 * float(summed.abs().max()) + 1e-6)


class Twice(nn.Module):
    """A layer that runs twice in one forward, on inputs of different rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(inputs)).unsqueeze(1)).squeeze(1)


class Spread(nn.Module):
    """K positions an example out of one input, so that the layer sees [B, K, in]."""

    def __init__(self, positions: int, num_in: int, num_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.positions = positions
        self.layer = nn.Linear(num_in, num_out, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        shifts = torch.arange(self.positions, dtype=inputs.dtype).view(1, -1, 1)
        return torch.sin(self.layer(torch.cos(inputs.unsqueeze(1) + shifts)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "without bias": lambda: nn.Linear(4, 3, bias=False),
    "mlp, activations in place": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)),
    "layer norm first": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)),
    "layer used twice": Twice,
    "positions, Gram": lambda: Spread(2, 4, 9),
    "positions, direct": lambda: Spread(12, 4, 3),
    "positions, no bias": lambda: Spread(3, 4, 5, bias=False),
    "positions, then in place": lambda: nn.Sequential(Spread(3, 4, 5), nn.Linear(5, 4), nn.ReLU(True), nn.Linear(4, 2)),
    "layer norm over positions": lambda: nn.Sequential(Spread(3, 4, 6), nn.LayerNorm(6)),
    "layer norm of two dimensions": lambda: nn.Sequential(Spread(3, 4, 6), nn.LayerNorm((3, 6))),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_equals_torch_func(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    check(model, torch.randn(7, 4))


@pytest.mark.parametrize("name", MODELS)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_examples_of_a_unit_add_up_before_the_norm(name: str, sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = MODELS[name]()
    inputs = torch.randn(sum(sizes), 4)
    total = torch.zeros(len(sizes), dtype=torch.float64)
    for gradients in per_example(model, inputs).values():
        joined = torch.stack([part.sum(dim=0) for part in gradients.double().split(sizes)])
        total += joined.flatten(1).square().sum(dim=1)
    with Capture(trained_layers(model)) as capture:
        model(inputs).square().sum().backward()
    found = capture.sq_norms(Units(torch.tensor(sizes)))
    torch.testing.assert_close(found.double(), total, rtol=2e-3, atol=1e-4)


def test_a_unit_without_examples_is_refused() -> None:
    with pytest.raises(InputError, match="at least one example, found a size of 0"):
        Units(torch.tensor([2, 0]))


@given(
    size=st.integers(1, 9),
    positions=st.integers(1, 14),
    num_out=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
@settings(max_examples=40, deadline=None)
def test_positions_of_any_shape(size: int, positions: int, num_out: int, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    check(Spread(positions, 4, num_out), torch.randn(size, 4) * scale)


def test_chunks_of_direct_gradients_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_rules, "_CHUNK_BYTES", 4 * 4 * 3 * 2)
    torch.manual_seed(0)
    check(Spread(12, 4, 3), torch.randn(7, 4))


Terms = Callable[[Tensor, Tensor], Tensor]
NORM = nn.LayerNorm(16)


def products(inputs: Tensor, grads: Tensor) -> Tensor:
    """What each position adds to the weight of a linear layer, [B, P, out, in]."""
    return grads.unsqueeze(3) * inputs.unsqueeze(2)


def normalised(inputs: Tensor, grads: Tensor) -> Tensor:
    return grads * torch.nn.functional.layer_norm(inputs.float(), (16,)).to(grads)


def of_gram(inputs: Tensor, grads: Tensor) -> Tensor:
    """Squared norms by plain Gram matrices."""
    return torch.bmm(inputs, inputs.transpose(1, 2)).mul(torch.bmm(grads, grads.transpose(1, 2))).sum(dim=(1, 2))


def of_bmm(inputs: Tensor, grads: Tensor) -> Tensor:
    return torch.bmm(grads.transpose(1, 2), inputs).flatten(1).norm(dim=1).square()


def of_sums(terms: Terms) -> Terms:
    return lambda inputs, grads: terms(inputs, grads).sum(dim=1).flatten(1).norm(dim=1).square()


def of_rule(layer: nn.Module, name: str) -> Terms:
    return lambda inputs, grads: norm_rules._rules[type(layer)].sq_norms(layer, [name], inputs, grads)


CANCELLING: dict[str, tuple[Terms, Terms, Terms]] = {
    # What is measured; how it would be without a bound on rounding; the terms that add up over positions.
    "linear, Gram": (norm_rules._gram_sq_norms, of_gram, products),
    "linear, direct": (norm_rules._direct_sq_norms, of_bmm, products),
    "linear, as chosen": (of_rule(nn.Linear(16, 16), "weight"), of_bmm, products),
    "linear bias": (of_rule(nn.Linear(16, 16), "bias"), of_sums(lambda _, grads: grads), lambda _, grads: grads),
    "layer norm weight": (of_rule(NORM, "weight"), of_sums(normalised), normalised),
    "layer norm bias": (of_rule(NORM, "bias"), of_sums(lambda _, grads: grads), lambda _, grads: grads),
}


@pytest.mark.parametrize("positions", [2, 9, 64])
@pytest.mark.parametrize("name", CANCELLING)
def test_cancelling_positions_never_pass_the_norm_bound(name: str, positions: int) -> None:
    """Terms that cancel to a small part of themselves: a norm may come out too large, never too small."""
    sq_norms, unguarded, terms = CANCELLING[name]
    torch.manual_seed(0)
    inputs = torch.randn(200, 1, 16) * 1e3 + torch.randn(200, positions, 16) * 1e-3
    factors = torch.randn(200, positions, 1)
    grads = torch.randn(200, 1, 16) * (factors - factors.mean(dim=1, keepdim=True))
    true = terms(inputs.double(), grads.double()).sum(dim=1).flatten(1).norm(dim=1)

    def largest(found: Tensor) -> float:
        return float((clip_coefficients(found, max_grad_norm=1e-9).double() * true).max())

    assert largest(sq_norms(inputs, grads)) <= 1e-9
    assert positions == 2 or largest(unguarded(inputs, grads).clamp(min=0)) > 1e-9  # the control


@pytest.mark.parametrize("rule", [LinearRule(), FormedRule()])
def test_positions_that_cancel_do_not_round_away_what_others_add(
    rule: NormRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sum in float64 keeps beside a huge negative term depends on its sign, and one unit decides that."""
    small = torch.full((2000, 1), 0.3 * 2.0**-2)
    huge = torch.full(
        (2000, 1), 2.0**50
    )  # one step of the sum beside it is 2^-2, or half of that if the sum is positive
    huge[:2] = 0.0
    layer, grads = nn.Linear(1, 1), torch.stack([-huge, small, huge], dim=1)

    def most_moved_by_the_first() -> float:
        sq_norm = float(rule.sq_norms(layer, ["bias"], grads[-1:], grads[-1:]))
        clip = 0.5 * math.sqrt(sq_norm) * (1.0 + ROUNDING + 1e-5)  # the coefficient of the others is a power of two
        grads[:2, 1, 0] = torch.tensor([0.9, -0.5]) * clip
        scale = clip_coefficients(rule.sq_norms(layer, ["bias"], grads, grads), max_grad_norm=clip)

        def total(first: int) -> Tensor:
            into = {"bias": torch.zeros(1, dtype=torch.float64)}
            rule.add_exact(layer, grads[first:], grads[first:], scale[first:], into)
            return into["bias"]

        return float((total(0) - total(1)).abs()) / clip

    assert most_moved_by_the_first() <= 1.0
    monkeypatch.setattr(norm_rules, "_LEAST_NORM", 0.0)
    assert most_moved_by_the_first() > 50.0  # the control


@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.LayerNorm(16)])
@pytest.mark.parametrize("positions", [1, 2, 40])
def test_a_bound_on_rounding_costs_next_to_nothing(layer: nn.Module, positions: int) -> None:
    """Where nothing cancels norms are what they are: a bound that is too large would shrink every contribution."""
    torch.manual_seed(0)
    inputs, grads = torch.randn(100, positions, 16), torch.randn(100, positions, 16)
    for name, terms in (("weight", products if isinstance(layer, nn.Linear) else normalised), ("bias", None)):
        each = grads if terms is None else terms(inputs, grads)
        true = each.double().sum(dim=1).flatten(1).square().sum(dim=1)
        torch.testing.assert_close(of_rule(layer, name)(inputs, grads).double(), true, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("columns", [1, 4096, 4097, 10_000])
def test_norms_of_long_rows_are_close_bounds(columns: int) -> None:
    """Pieces of a row may be zero, tiny or huge; float32 squares of the last two vanish and overflow."""
    torch.manual_seed(0)
    rows = torch.randn(6, columns) * torch.tensor([0.0, 1e-30, 1e-10, 1.0, 1e10, 1e30]).unsqueeze(1)
    mixed = torch.randn(40, columns) * torch.rand(columns).pow(50)
    mixed[:, columns // 2 :] = 0.0
    for some in (rows, mixed):
        true = some.double().norm(dim=1)
        found = norm_rules._norms(some)
        assert bool((found >= true * (1 - 1e-12)).all())  # which rounds, too
        assert bool((found <= true * 1.0003).all())


def test_no_weight_gradient_is_formed_in_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Capture(trained_layers(model)):
        assert not any(p.requires_grad for p in model.parameters())
        model(torch.randn(5, 4)).sum().backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)
    assert all(p.requires_grad for p in model.parameters())


def test_the_model_is_whole_again_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    with pytest.raises(RuntimeError), Capture(trained_layers(model)):
        model(torch.randn(5, 3))
    assert all(p.requires_grad for p in model.parameters())
    assert not model[0]._forward_hooks


def test_frozen_parameters_are_constants() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    assert [layer.names for layer in trained_layers(model).values()] == [("bias",), ("weight", "bias")]
    sq_norms, _ = captured(model, torch.randn(5, 4), torch.ones(5))
    assert not model[0].weight.requires_grad
    assert (sq_norms > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), r"'1' \(BatchNorm1d\).*lazydp\.api\.fix\(model\)"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4, affine=False)), "couples examples"),
        (lambda: nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True)), "couples examples"),
        (lambda: nn.Sequential(nn.GRU(4, 4)), r"'0' \(GRU\).*batch_first=True"),
        (lambda: nn.LSTM(4, 4, 2, batch_first=True, dropout=0.1), r"the model itself.*LSTM.*nn\.Dropout between them"),
        (lambda: nn.Linear(4, 4).double(), r"'weight' is torch\.float64.*model\.float\(\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4).to(torch.bfloat16)), r"'0\.weight' is torch\.bfloat16"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"'0\.weight' has no shape yet"),
        (lambda: nn.ParameterList([torch.zeros(2)]), "is no model"),
    ],
)
def test_unsupported_layers_are_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trained_layers(make())


def test_layers_that_share_a_parameter_take_the_slow_path() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    torch.manual_seed(0)
    check(model, torch.randn(5, 4))
    assert slow_paths(trained_layers(model)) == ("0.weight", "0.bias")


def test_subclasses_take_the_slow_path() -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    assert slow_paths(trained_layers(Doubled(4, 4))) == ("weight", "bias")
    check(Doubled(4, 4), torch.randn(5, 4))


def test_layers_must_be_batch_first() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs.t())

    with pytest.raises(InputError, match="batch-first"):
        captured(Transposed(), torch.randn(5, 4), torch.ones(5))


def test_an_input_modified_after_the_layer_read_it_is_refused() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = inputs * 1.0
            result = self.layer(hidden)
            hidden.mul_(2.0)
            return result

    with pytest.raises(InputError, match="modified in place"):
        captured(Overwrites(), torch.randn(5, 4), torch.ones(5))


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
def test_norms_are_close_where_positions_nearly_cancel(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates that look alike, with the gradients of a softmax: clipped more than needed would cost accuracy."""
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(8, positions, 256, generator=generator) for positions in (1, 21))
    inputs = shared + spread * own
    grads = torch.randn(8, 21, 128, generator=generator)
    grads -= grads.mean(dim=1, keepdim=True)
    true = torch.linalg.matrix_norm(grads.double().transpose(1, 2) @ inputs.double())
    ratios = of_rule(nn.Linear(256, 128), "weight")(inputs, grads).sqrt() / true
    assert float(ratios.min()) >= 1.0
    assert float(ratios.max()) <= 1.01
    monkeypatch.setattr(norm_rules, "_LOOSE", math.inf)  # the control: what it was before
    before = of_rule(nn.Linear(256, 128), "weight")(inputs, grads).sqrt() / true
    assert float(before.max()) > {1.0: 1.0, 1e-2: 1.03, 1e-3: 3.0}[spread]
    assert float(before.min()) >= 1.0


class Scale(nn.Module):
    """A layer of a user's own: one factor a column."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(1, 2, width))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


class ScaleRule(NormRule):
    parameters = ("factor",)

    def sq_norms(self, layer: nn.Module, names: Any, inputs: Tensor, grads: Tensor) -> Tensor:
        return (inputs * grads).sum(dim=1).square().sum(dim=1)

    def add_weighted(self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Any) -> None:
        into["factor"].add_(((inputs * grads).sum(dim=1) * scale.unsqueeze(1)).sum(dim=0))


def test_a_registered_rule_makes_a_layer_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_rules, "_rules", dict(norm_rules._rules))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Scale(3), nn.Linear(3, 2))
    assert slow_paths(trained_layers(model)) == ("1.factor",)
    check(model, torch.randn(6, 4))

    class Unnamed(ScaleRule):
        parameters = ()  # type: ignore[assignment]

    with pytest.raises(InputError, match="Unnamed does not state its `parameters`: name those of Scale"):
        register_rule(Scale, Unnamed())
    register_rule(Scale, ScaleRule())
    assert not slow_paths(trained_layers(model))
    check(model, torch.randn(6, 4))


def test_coefficients_clip_and_never_let_a_norm_pass() -> None:
    sq_norms = torch.tensor([0.0, 0.25, 4.0, 1e30, float("inf"), float("nan")])
    coefficients = clip_coefficients(sq_norms, max_grad_norm=1.0)
    torch.testing.assert_close(coefficients[:4], torch.tensor([1.0, 1.0, 0.5, 1e-15]), rtol=2 * ROUNDING, atol=0.0)
    assert coefficients[4:].tolist() == [0.0, 0.0]
    assert clip_coefficients(torch.tensor([1e30]), max_grad_norm=float("inf")).tolist() == [1.0]
    norms = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 10
    clipped = clip_coefficients(norms.square(), max_grad_norm=1.0).double() * norms.double()
    assert clipped.max() <= 1.0
