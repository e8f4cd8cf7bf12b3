"""The noise that arrives has the promised variance, whatever the learning rate and the weights are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.components.train.tables.embedding_tables import EmbeddingTables, TableGradient
from lazydp.components.train.tables.lookups import Lookups
from lazydp.components.train.tables.precision import MOST_MARGIN, Rounding
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.components.train.tables.weight_bound import WeightBound
from lazydp.kernels.noise_key import NoiseKey

BATCH, STEPS = 1e4, 12


def tables_of(weight: Tensor, *, rate: float, batch: float = BATCH, **optimizer: Any) -> EmbeddingTables:
    return EmbeddingTables(
        {"item": weight},
        mode="lazydp",
        optimizer=EmbeddingSgd(lambda step: rate, **optimizer),
        noise_scale=1.0 / batch,
        key=NoiseKey.for_tests(0),
        bound=1.0 / batch,
    )


def table_of(tables: EmbeddingTables) -> dict[str, Any]:
    table: dict[str, Any] = tables.state_dict()["tables"]["item"]
    return table


def rows_of(tables: EmbeddingTables) -> Tensor:
    """Both floats together, float64."""
    table = table_of(tables)
    rows: Tensor = table["weight"].double()
    return rows if table["rest"] is None else rows + table["rest"].double()


def step(tables: EmbeddingTables, gradients: Tensor, *, batch: float = BATCH) -> None:
    """A step in which unit i sends gradients[i], [units, D], to row 0."""
    units = gradients.shape[0]
    lookups = Lookups(torch.zeros(units, dtype=torch.int64), torch.arange(units + 1), None, 1)
    groups = tables.group_rows([{"item": lookups}])
    tables.catch_up(groups)
    scale = torch.full((units,), 1.0 / batch)
    tables.add_gradient(groups, {"item": [TableGradient(lookups, gradients, scale)]})
    tables.advance()


def one_float(patch: pytest.MonkeyPatch) -> None:
    """The planted fault: rows are never given the second."""
    patch.setattr(Rounding, "begins_with_two", lambda *_: False)
    patch.setattr(Rounding, "needs_second_float", lambda *_, **__: False)


def deviations(rate: float, std: float, momentum: float) -> float:
    """By how many standard errors the variance of all noise misses the promise."""
    before = torch.randn(2000, 16, generator=torch.Generator().manual_seed(3)) * std
    tables = tables_of(before.clone(), rate=rate, momentum=momentum)
    for step in range(STEPS):
        tables.advance()
        if step % 4 == 3:
            tables.flush()
    moved = rows_of(tables) - before.double()
    promised = float(tables._skip_ahead._moments[0, (momentum and 4) or 1])
    return (float(moved.square().mean()) / promised - 1.0) / math.sqrt(2.0 / moved.numel())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("std", [0.0, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("rate", [1e-6, 1e-4, 1e-2, 1.0, 10.0])
def test_the_noise_that_arrives_has_the_promised_variance(rate: float, std: float, momentum: float) -> None:
    assert abs(deviations(rate, std, momentum)) < 3.0


def test_one_float_alone_loses_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what the second float is for."""
    one_float(monkeypatch)
    assert deviations(1e-4, 1.0, 0.0) < -20.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_state_takes_both_floats_along(momentum: float) -> None:
    before = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole, first = (tables_of(before.clone(), rate=1e-5, momentum=momentum) for _ in range(2))
    gradient = torch.full((3, 4), 0.5)
    for tables in (whole, first):
        for _ in range(3):
            step(tables, gradient)
            tables.flush()
    resumed = tables_of(torch.zeros_like(before), rate=1e-5, momentum=momentum)
    resumed.load_state_dict(first.state_dict())
    for tables in (whole, resumed):
        step(tables, gradient)
        tables.flush()
    one, other = table_of(whole), table_of(resumed)
    for part in ("weight", "rest", *(("momentum", "momentum_rest") if momentum else ())):
        assert one[part].any()
        assert torch.equal(one[part], other[part]), part


def test_rows_that_outgrow_one_float_get_the_second_in_time() -> None:
    """What was chosen for small weights would round a step away once they are large."""
    tables = tables_of(torch.full((4, 4), 0.01), rate=1.0)
    step(tables, torch.ones(2, 4))
    assert table_of(tables)["rest"] is None
    tables.flush()
    table_of(tables)["weight"].fill_(1e4)
    before = rows_of(tables)
    step(tables, torch.ones(2, 4))
    tables.flush()
    assert table_of(tables)["rest"] is not None
    moved = rows_of(tables) - before
    assert torch.all(moved != 0.0)
    assert moved.abs().max() < 10.0 / BATCH  # an ulp of these weights is 0.001
    assert list(tables.weights()) == ["item"]


def test_a_row_that_grows_step_by_step_is_seen_by_the_bound_on_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looks at the whole table the bound must never fall short of a weight."""
    tables = tables_of(torch.full((50, 4), 0.01), rate=1.0, batch=64.0)
    looks: list[float] = []
    right = WeightBound.refutes

    def watched(self: WeightBound, too_large: Any, *, noise: float) -> bool:
        small = right(self, too_large, noise=noise)
        looks.append(self._largest - float(self._weight.abs().max()) + 9 * noise)
        return small

    monkeypatch.setattr(WeightBound, "refutes", watched)
    for number in range(40):
        # Few units and many, so that rows are hot in some steps alone.
        step(tables, -torch.ones(4 if number % 2 else 40, 4), batch=64.0)
    assert len(looks) == 40
    assert min(looks) >= 0.0
    assert float(table_of(tables)["weight"].abs().max()) > 5.0
    assert max(looks) < 10.0


MANY = 65_000
OPTIMIZERS: dict[str, dict[str, float]] = {
    "plain": {"rate": 1.0},
    "decay": {"rate": 1.0, "weight_decay": 0.01},
    "momentum": {"rate": 1.0, "momentum": 0.99},
    "both": {"rate": 1.0, "momentum": 0.99, "weight_decay": 0.01},
}


def excess(*, part: float, **optimizer: Any) -> float:
    """By how much of itself a unit's contribution differs after 24 steps in which all 65,000 units point one way."""
    rows = []
    for is_in in (False, True):
        tables = tables_of(torch.zeros(1, 1), batch=MANY, **optimizer)
        gradients = torch.full((65, 1), 1000.0)  # each stands for a thousand units
        gradients[0] += part  # moves the sums along the grid of float32
        for _ in range(24):
            step(tables, gradients, batch=MANY)
        step(tables, torch.cat([gradients, torch.ones(int(is_in), 1)]), batch=MANY)
        tables.flush()
        rows.append(rows_of(tables))
    added = float((rows[0] - rows[1]).abs()) / (optimizer["rate"] / MANY)
    return abs(added - 1.0)


PARTS = (0.1, 0.3, 0.5, 0.7, 1.1, 1.9, 2.6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_unit_adds_no_more_than_it_may_where_all_point_one_way(name: str) -> None:
    assert max(excess(part=part, **OPTIMIZERS[name]) for part in PARTS) < MOST_MARGIN


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_float_lets_a_unit_add_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control, and with momentum the case that was found: the velocity's ulp is 12.5 % of C / b."""
    one_float(monkeypatch)
    assert max(excess(part=part, **OPTIMIZERS[name]) for part in PARTS) > MOST_MARGIN


def test_a_small_table_takes_its_gradients_beside_a_large_one() -> None:
    """What one table needs says nothing of another: each is judged by its own weights."""
    tables = EmbeddingTables(
        {"large": torch.full((2, 2), 1e6), "small": torch.zeros(2, 2)},
        mode="lazydp",
        optimizer=EmbeddingSgd(1.0),
        noise_scale=1e-3 / BATCH,
        key=NoiseKey.for_tests(0),
        bound=1.0 / BATCH,
    )
    lookups = Lookups(torch.zeros(1, dtype=torch.int64), torch.arange(2), None, 1)
    groups = tables.group_rows([dict.fromkeys(tables.names, lookups)])
    scale = torch.full((1,), 1.0 / BATCH)
    sent = {name: [TableGradient(lookups, torch.ones(1, 2), scale)] for name in tables.names}
    tables.add_gradient(groups, sent)
    state = tables.state_dict()["tables"]
    assert [name for name in tables.names if state[name]["rest"] is not None] == ["large"]
    assert torch.equal(state["small"]["weight"][0], torch.full((2,), -1.0 / BATCH))
    moved = state["large"]["rest"][0] + (state["large"]["weight"][0] - 1e6)
    torch.testing.assert_close(moved, torch.full((2,), -1.0 / BATCH), rtol=1e-5, atol=0.0)
