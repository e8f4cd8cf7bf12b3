"""The skip-ahead table against step-by-step simulation in float64, and against torch.optim.SGD."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazydp.components.shared.errors import FormatError, InputError
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd, SkipAhead, refuse_nonlinear

pytestmark = pytest.mark.usefixtures("one_thread")

NOISE_SCALE = 0.7

rates = st.lists(st.floats(0.0, 0.5), min_size=1, max_size=12)
decays = st.sampled_from([0.0, 0.01, 0.3])
momenta = st.sampled_from([0.0, 0.1, 0.9, 0.99])


def step_matrices(rate: float, decay: float, momentum: float) -> tuple[Tensor, Tensor]:
    """A and B of one step, from the definition of torch.optim.SGD."""
    if not momentum:
        return torch.tensor([[1 - rate * decay]], dtype=torch.float64), torch.tensor([[-rate]], dtype=torch.float64)
    # v' = mu v + wd w + g;  w' = w - lr v'
    a = torch.tensor([[1 - rate * decay, -rate * momentum], [decay, momentum]], dtype=torch.float64)
    return a, torch.tensor([[-rate], [1.0]], dtype=torch.float64)


def lower(factor: Tensor) -> Tensor:
    if factor.numel() == 1:
        return factor.double().view(1, 1)
    l11, l21, l22 = factor.double().tolist()
    return torch.tensor([[l11, 0.0], [l21, l22]], dtype=torch.float64)


@given(rates=rates, decay=decays, momentum=momenta)
@settings(max_examples=60, deadline=None)
def test_every_start_agrees_with_simulation(rates: list[float], decay: float, momentum: float) -> None:
    table = SkipAhead(EmbeddingSgd(schedules.tabulated(rates), momentum, decay), noise_scale=NOISE_SCALE)
    for _ in rates:
        table.advance()
    size = 2 if momentum else 1
    for start in range(len(rates) + 1):
        transition, covariance = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        for rate in rates[start:]:
            a, b = step_matrices(rate, decay, momentum)
            transition = a @ transition
            covariance = a @ covariance @ a.T + b @ b.T * NOISE_SCALE**2
        factor = lower(table.factor[start])
        torch.testing.assert_close(table.transition[start].double().view(size, size), transition, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-5, atol=1e-7)


@given(rates=rates, decay=decays, momentum=momenta)
@settings(max_examples=60, deadline=None)
def test_ones_add_up(rates: list[float], decay: float, momentum: float) -> None:
    table = SkipAhead(
        EmbeddingSgd(schedules.tabulated(rates), momentum, decay), noise_scale=NOISE_SCALE, distribution="ones"
    )
    for _ in rates:
        table.advance()
    size = 2 if momentum else 1
    for start in range(len(rates) + 1):
        state = torch.zeros(size, 1, dtype=torch.float64)
        for rate in rates[start:]:
            a, b = step_matrices(rate, decay, momentum)
            state = a @ state + b * NOISE_SCALE
        ones = torch.ones(size, 1, dtype=torch.float64)
        torch.testing.assert_close(lower(table.factor[start]) @ ones, state, rtol=1e-5, atol=1e-7)


def test_plain_sgd_is_the_formula_of_the_design() -> None:
    rate = schedules.warmup_cosine(0.3, steps=20, warmup_steps=5)
    table = SkipAhead(EmbeddingSgd(rate), noise_scale=NOISE_SCALE)
    for _ in range(20):
        table.advance()
    squares = [rate(step) ** 2 for step in range(1, 21)]
    expected = [-NOISE_SCALE * math.sqrt(math.fsum(squares[start:])) for start in range(21)]
    torch.testing.assert_close(table.factor[:, 0], torch.tensor(expected))
    torch.testing.assert_close(table.transition, torch.ones(21, 1))


@given(rates=rates, decay=decays, momentum=momenta, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_gradients_applied_early_give_torch_sgd(rates: list[float], decay: float, momentum: float, seed: int) -> None:
    """A row that gets a gradient at some steps and none at others ends where torch.optim.SGD takes it."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(len(rates), generator=generator, dtype=torch.float64)
    awake = torch.rand(len(rates), generator=generator) < 0.5
    parameter = torch.ones(1, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([parameter], lr=0.1, momentum=momentum, weight_decay=decay)
    table = SkipAhead(EmbeddingSgd(schedules.tabulated(rates), momentum, decay), noise_scale=0.0)
    size = table.dimension
    state, last = torch.zeros(size, 1, dtype=torch.float64), 0
    state[0] = 1.0
    for step, rate in enumerate(rates):
        gradient = gradients[step] if awake[step] else torch.zeros((), dtype=torch.float64)
        if awake[step]:
            state = table.transition[last].double().view(size, size) @ state
            last = step
            state[-1] += table.gradient_scale() * gradient
        table.advance()
        reference.param_groups[0]["lr"] = rate
        parameter.grad = gradient.view(1)
        reference.step()
    state = table.transition[last].double().view(size, size) @ state
    torch.testing.assert_close(state[0], parameter.detach(), rtol=1e-5, atol=1e-5)


def test_a_long_run_outgrows_the_first_capacity() -> None:
    table = SkipAhead(EmbeddingSgd(schedules.constant(0.1)), noise_scale=1.0)
    for _ in range(2500):
        table.advance()
    assert table.transition.shape == (2501, 1)
    torch.testing.assert_close(table.factor[0, 0], torch.tensor(-0.1 * math.sqrt(2500)))
    assert table.factor[2500, 0] == 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_round_trip(momentum: float) -> None:
    optimizer = EmbeddingSgd(schedules.warmup_cosine(0.2, steps=50), momentum, 0.01)
    first, second = SkipAhead(optimizer, noise_scale=1.0), SkipAhead(optimizer, noise_scale=1.0)
    for _ in range(30):
        first.advance()
    second.load_state_dict(first.state_dict())
    for table in (first, second):
        table.advance()
    assert torch.equal(first.transition, second.transition)
    assert torch.equal(first.factor, second.factor)


def test_state_of_another_optimizer_is_refused() -> None:
    plain = SkipAhead(EmbeddingSgd(schedules.constant(0.1)), noise_scale=1.0)
    with pytest.raises(FormatError, match="another optimizer"):
        SkipAhead(EmbeddingSgd(schedules.constant(0.1), 0.9), noise_scale=1.0).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", ["adam", "Adagrad", "rmsprop"])
def test_adaptive_optimizers_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match="linear in the noise"):
        refuse_nonlinear(name)
    refuse_nonlinear("SGD")


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="momentum"):
        EmbeddingSgd(schedules.constant(0.1), momentum=1.0)
    with pytest.raises(InputError, match="weight_decay"):
        EmbeddingSgd(schedules.constant(0.1), weight_decay=-1.0)
    with pytest.raises(InputError, match="step 3"):
        EmbeddingSgd(schedules.tabulated([0.1, 0.1, -0.1])).rate(3)
    with pytest.raises(InputError, match="stay below 1"):
        EmbeddingSgd(schedules.constant(2.0), weight_decay=0.5).rate(1)


def test_torch_schedulers_are_tabulated() -> None:
    rate = schedules.from_torch(
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5), learning_rate=1.0, steps=5
    )
    assert [rate(step) for step in range(1, 6)] == [1.0, 1.0, 0.5, 0.5, 0.25]
    with pytest.raises(InputError, match="steps 1 to 5"):
        rate(6)


def test_schedules_begin_and_end_where_they_say() -> None:
    cosine = schedules.warmup_cosine(1.0, steps=100, warmup_steps=10, final_fraction=0.1)
    straight = schedules.linear(1.0, steps=100, warmup_steps=10, final_fraction=0.1)
    for rate in (cosine, straight):
        assert rate(5) == 0.5
        assert rate(10) == 1.0
        assert rate(100) == pytest.approx(0.1)
    assert straight(55) == pytest.approx(0.55)
