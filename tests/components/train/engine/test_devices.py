"""Every placement trains the weights of the CPU: on a GPU where there is one (`make gpu`), else on a simulated one.

What a machine with a GPU needs for it beside torch is pydantic, PyYAML and pyarrow: nothing here reads a dataset.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lazydp.components.train.data.examples import Examples
from lazydp.components.train.device import placement
from lazydp.components.train.device.placement import HOST, Placement
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.report import StepReport
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.mechanism.parameters import GroupNorms, PrivacyParameters
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd

pytestmark = pytest.mark.usefixtures("one_thread")

PLACEMENTS = {"on the GPU": ("cuda", None), "tables in host memory": ("cuda", "cpu")}


def batches_of(world: Any, *, users: bool = False) -> list[list[Examples]]:
    """Steps of none, one and two micro-batches."""
    steps = [[world.examples(5, seed=1)], [], [world.examples(4, seed=2), world.examples(3, seed=3)]]
    steps += [[world.examples(6, seed=4)], [world.examples(2, seed=5), world.examples(6, seed=6)]]
    sizes = {2: [2], 3: [1, 2], 4: [1, 1, 2], 5: [1, 2, 2], 6: [2, 2, 2]}
    if not users:
        return steps
    return [[replace(e, user_sizes=torch.tensor(sizes[e.size])) for e in step] for step in steps]


def trained(engine: Engine, steps: list[list[Examples]]) -> tuple[dict[str, Tensor], list[StepReport]]:
    """Weights after `steps` and a flush, on the CPU; and the report of each step."""
    reports = [engine.step(step) for step in steps]
    engine.flush()
    dense = {f"dense {name}": p.detach().cpu() for name, p in engine.model.named_parameters()}
    return dense | {f"table {name}": weight.cpu() for name, weight in engine.tables.weights().items()}, reports


def on_host(state: Any) -> Any:
    """A state as a checkpoint's file gives it back."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


USER = PrivacyParameters(noise_multiplier=0.7, max_grad_norm=0.3, expected_batch_size=4.0, user_gradient="mean")
VARIANTS: dict[str, dict[str, Any]] = {
    "lazy": {},
    "two towers": {"model": "two tower"},
    "adam": {"dense": DenseOptimizer.named("adam", learning_rate=schedules.constant(0.01))},
    "eager": {"mode": "dpsgd"},
    "without privacy": {"mode": "sgd"},
    "momentum": {"embeddings": EmbeddingSgd(schedules.constant(0.3), 0.6, 0.02)},
    "ones for noise": {"noise": "ones"},
    "a norm for each group": {
        "privacy": replace(USER, user_gradient=None, max_grad_norm=GroupNorms(dense=0.2, embeddings=0.5))
    },
    "users, mean": {"privacy": USER},
    "users, sum": {"privacy": replace(USER, user_gradient="sum")},
    "users without privacy": {"privacy": USER, "mode": "sgd"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.usefixtures("gpu")
def test_every_placement_trains_the_weights_of_the_cpu(
    world: Any, placed_engine: Any, assert_close_weights: Any, place: str, variant: str
) -> None:
    made = world(pooling="mean")
    changes = VARIANTS[variant]
    steps = batches_of(made, users=changes.get("privacy", USER).user_gradient is not None and "privacy" in changes)
    expected, on_cpu = trained(placed_engine(made, HOST, **changes), steps)
    found, reports = trained(placed_engine(made, Placement.of(*PLACEMENTS[place]), **changes), steps)
    assert_close_weights(found, expected)
    for ours, theirs in zip(reports, on_cpu, strict=True):
        assert (ours.size, ours.units, ours.clipped) == (theirs.size, theirs.units, theirs.clipped)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4, nan_ok=True)
        assert ours.mean_norm == pytest.approx(theirs.mean_norm, rel=1e-4, nan_ok=True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_rows_of_two_floats_move_as_on_the_cpu(world: Any, placed_engine: Any, momentum: float) -> None:
    """At this rate the first float of most weights never changes: what is compared is what both make together."""
    made = world(pooling="mean")
    sgd = EmbeddingSgd(schedules.constant(1e-8), momentum, 0.02)
    moved = []
    for place in (HOST, *(Placement.of(*names) for names in PLACEMENTS.values())):
        engine = placed_engine(made, place, embeddings=sgd)
        before = {name: table["weight"].cpu().clone() for name, table in engine.tables.state_dict()["tables"].items()}
        trained(engine, batches_of(made))
        tables = on_host(engine.tables.state_dict()["tables"])
        moved.append({name: (t["weight"] - before[name]).double() + t["rest"].double() for name, t in tables.items()})
    for found in moved[1:]:
        for name, expected in moved[0].items():
            largest = float(expected.abs().max())
            assert 0.0 < largest < 1e-6
            torch.testing.assert_close(found[name], expected, rtol=0.0, atol=1e-4 * largest)


@pytest.mark.usefixtures("gpu")
def test_a_gradient_that_is_not_finite_counts_zero_without_a_look(
    world: Any, placed_engine: Any, assert_close_weights: Any
) -> None:
    made = world()
    examples = made.examples(5, seed=1)
    examples.dense[2] = math.nan
    expected, (on_cpu,) = trained(placed_engine(made, HOST), [[examples]])
    assert on_cpu.non_finite == 1
    for names in PLACEMENTS.values():
        engine = placed_engine(made, Placement.of(*names))
        found, (report,) = trained(engine, [[examples]])
        assert report.non_finite == 1
        assert_close_weights(found, expected)


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.usefixtures("gpu")
def test_a_checkpoint_has_no_device(world: Any, placed_engine: Any, assert_close_weights: Any, place: str) -> None:
    """Written on one placement it goes on elsewhere; on the same one, to the same bits."""
    made = world()
    steps = batches_of(made)
    changes = {"embeddings": EmbeddingSgd(schedules.constant(0.3), 0.6, 0.02)}
    where = Placement.of(*PLACEMENTS[place])
    whole = placed_engine(made, where, **changes)
    expected, _ = trained(whole, steps)
    begun = placed_engine(made, where, **changes)
    for step in steps[:3]:
        begun.step(step)
    for elsewhere in (where, HOST):
        resumed = placed_engine(made, elsewhere, **changes)
        resumed.load_state_dict(on_host(begun.state_dict()))  # optimizers go on with the very tensors they load
        assert resumed.pending() == begun.pending() > 0
        found, _ = trained(resumed, steps[3:])
        if elsewhere is where:
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert_close_weights(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
@pytest.mark.parametrize("place", PLACEMENTS)
def test_a_step_on_a_gpu_makes_the_host_wait_where_it_is_meant_to(
    world: Any, placed_engine: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own watch, which looks away for the waits that are meant."""
    engine, steps = placed_engine(world(), Placement.of(*PLACEMENTS[place])), batches_of(world())
    engine.step(steps[0])  # the first call of a kernel loads it, and may wait
    wait, waits = placement.wait, []

    def meant(device: torch.device) -> None:
        torch.cuda.set_sync_debug_mode("default")
        wait(device)
        waits.append(device)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(placement, "wait", meant)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(steps[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == (1 if place == "on the GPU" else len(steps[2]))
