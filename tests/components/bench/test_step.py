"""The contestants of `lazydp bench step` run, do the same work, and are counted alike."""

import json

import pytest
import torch

from lazydp.components.bench import step
from lazydp.components.bench.shapes import SHAPES, shape_of
from lazydp.components.bench.trainers import TorchSgd, engine
from lazydp.components.shared.errors import InputError

SMALL = shape_of("small")


def test_every_contestant_runs() -> None:
    pytest.importorskip("opacus")
    results = step.run(shape="small", repeats=2)
    assert [result.contestant for result in results] == list(step.CONTESTANTS)
    for result in results:
        document = json.loads(result.to_json())
        assert document["bench"] == "step"
        assert document["median_s"] > 0
        assert document["shape"]["batch"] == SMALL.batch_size
        assert document["ratios"].keys() == set(step.CONTESTANTS) - {result.contestant}


def test_the_two_without_privacy_take_the_same_step() -> None:
    """Otherwise their times would not compare."""
    tables = [SMALL.weights(), SMALL.weights()]
    plain, ours = TorchSgd(SMALL, tables[0]), engine(SMALL, tables[1], "sgd")
    for seed in range(3):
        plain.step(SMALL.examples(seed))
        ours.step(SMALL.examples(seed))
    for name, weight in ours.table_weights().items():
        assert not torch.equal(weight, SMALL.weights()[name])
        torch.testing.assert_close(plain.bags[name].weight.detach(), weight, rtol=1e-5, atol=1e-7)
    for expected, found in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(expected, found, rtol=1e-5, atol=1e-7)


def test_the_breakdown_names_the_phases_of_the_step() -> None:
    seconds = step.breakdown(shape="small", repeats=2)
    assert list(seconds)[:4] == ["lookups", "catch-up", "gather", "forward"]
    assert {"backward", "norms", "weighted products", "scatter", "dense noise", "optimizer"} <= seconds.keys()
    assert all(value > 0 for value in seconds.values())


def test_opacus_stays_out_where_its_copies_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_free_memory", lambda: SMALL.table_bytes * 3)
    results = step.run(shape="small", repeats=1, contestants=("sgd", "opacus"))
    assert [result.contestant for result in results] == ["sgd"]


def test_tables_shrink_to_memory_unless_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_free_memory", lambda: 1 << 30)
    fitted = step._fitted("mlperf", None)
    assert fitted.table_bytes <= 1 << 29
    assert step._fitted("mlperf", 123).rows == 123


def test_counts_by_hand() -> None:
    small = SHAPES["small"]
    # bottom 13-16-8, top (8 + 6)-16-1, interaction of 4 vectors of 8; 64 examples
    multiplied = 13 * 16 + 16 * 8 + 14 * 16 + 16 * 1
    assert small.matmul_flops() == 2 * 64 * (3 * multiplied - 13 * 16 + 2 * 4 * 4 * 8)
    distinct = 3 * round(1000 * (1 - (1 - 1 / 1000) ** 128))
    assert small.embedding_bytes() == (3 * 128 + 2 * distinct) * 8 * 4


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="no shape 'huge'"):
        step.run(shape="huge")
    with pytest.raises(InputError, match="no contestant 'jax'"):
        step.run(shape="small", contestants=("jax",))
