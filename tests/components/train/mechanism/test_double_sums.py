"""Sums in float64 that steps reuse: what an earlier step left is never added to."""

import torch
from torch import nn

from lazydp.components.train.mechanism.double_sums import DoubleSums, LayerSums


def test_a_sum_begins_at_zero_in_each_step() -> None:
    sums, weight, bias = DoubleSums(), nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    sums.of(weight).add_(5.0)
    assert sums.used(weight) is sums.of(weight)
    assert sums.used(bias) is None
    assert (sums.of(weight) == 5.0).all()  # asked for again in the same step
    sums.clear()
    assert sums.used(weight) is None
    assert (sums.of(weight) == 0.0).all()


def test_the_first_to_ask_in_a_step_overwrites_or_gets_zeros() -> None:
    sums, weight = DoubleSums(), nn.Parameter(torch.ones(2, 3))
    layer = LayerSums(sums, {"weight": weight})
    for _ in range(2):
        total, empty = layer.begun("weight")
        assert empty
        total.fill_(7.0)
        total, empty = layer.begun("weight")
        assert not empty
        assert (layer["weight"] == 7.0).all()
        sums.clear()
    assert (layer["weight"] == 0.0).all()


def test_a_layer_that_is_asked_for_its_names_begins_no_sum() -> None:
    sums, weight = DoubleSums(), nn.Parameter(torch.ones(2, 3))
    layer = LayerSums(sums, {"weight": weight})
    assert "weight" in layer
    assert "bias" not in layer
    assert list(layer) == ["weight"]
    assert len(layer) == 1
    assert sums.used(weight) is None


def test_some_rows_are_added_to_a_sum_that_began_at_zero() -> None:
    sums, weight = DoubleSums(), nn.Parameter(torch.ones(4, 3))
    sums.of(weight).fill_(9.0)
    sums.clear()
    total, empty = LayerSums(sums, {"weight": weight}, slice(1, 3)).begun("weight")
    assert not empty
    total += 2.0
    assert sums.of(weight)[:, 0].tolist() == [0.0, 2.0, 2.0, 0.0]
