"""The CUDA noise kernels, run by the host, give the bits of the CPU operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.kernels import ops, reference
from lazydp.kernels.noise_key import NoiseKey

KEY = NoiseKey.for_tests(7).tensor()
SHAPES = [(1, 1), (3, 4), (5, 12), (7, 13), (33, 16), (4, 30), (20, 128), (2, 1000)]
HORIZON = 9
STEP = 8


def skip_ahead(momentum: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "transition": torch.rand(HORIZON, 4 if momentum else 1, generator=generator),
        "factor": torch.randn(HORIZON, 3 if momentum else 1, generator=generator),
    }


def state(rows: int, columns: int, *, momentum: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return {
        "weight": torch.randn(rows, columns, generator=generator),
        "last": torch.randint(0, STEP + 1, (rows,), dtype=torch.int32, generator=generator),
        "momentum": torch.randn(rows, columns, generator=generator) if momentum else None,
    }


def copy(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else value.clone() for name, value in values.items()}


def assert_same_after(
    one: Callable[..., None], other: Callable[..., None], values: dict[str, Any], *arguments: Any, **options: Any
) -> None:
    """Both leave the same bits in weight, last and momentum."""
    results = []
    for operator in (one, other):
        own = copy(values)
        operator(own["weight"], own["last"], *arguments, momentum=own["momentum"], **options)
        results.append(own)
    for name, expected in results[1].items():
        if expected is not None:
            assert torch.equal(results[0][name], expected), name
            assert not torch.equal(expected, values[name]) or expected.numel() < 4, f"{name} did not change"


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_fill_equals_the_cpu(cuda: Any, rows: int, columns: int) -> None:
    address = {"table": 3, "first_row": (1 << 40) + 11, "step": 12345}
    found = cuda.normal_(torch.full((rows, columns), torch.nan), KEY, **address)
    assert torch.equal(found, ops.normal_(torch.empty(rows, columns), KEY, **address))


def test_fill_follows_the_reference(cuda: Any) -> None:
    address = {"table": 0x8000, "first_row": 5, "step": 2}
    found = cuda.normal_(torch.empty(64, 40), KEY, **address)
    torch.testing.assert_close(found, reference.normal_(torch.empty(64, 40), KEY, **address), rtol=2e-6, atol=2e-6)
    other = cuda.normal_(torch.empty(64, 40), KEY, **{**address, "step": 3})
    assert (found == other).float().mean() < 0.01


def test_fill_of_rows_that_are_not_aligned(cuda: Any) -> None:
    buffer = torch.empty(1 + 6 * 16)
    address = {"table": 1, "first_row": 0, "step": 1}
    found = cuda.normal_(buffer[1:].view(6, 16), KEY, **address)
    assert torch.equal(found, ops.normal_(torch.empty(6, 16), KEY, **address))


@pytest.mark.parametrize("momentum", [False, True], ids=["sgd", "momentum"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_flush_equals_the_cpu(cuda: Any, rows: int, columns: int, momentum: bool) -> None:
    options = {"table": 2, "step": STEP, "first_row": 2**33 + 7, **skip_ahead(momentum)}
    assert_same_after(cuda.flush_, ops.flush_, state(rows, columns, momentum=momentum), KEY, **options)


@pytest.mark.parametrize("noise", ["gaussian", "ones"])
@pytest.mark.parametrize("momentum", [False, True], ids=["sgd", "momentum"])
@pytest.mark.parametrize(("rows", "columns"), [(50, 128), (40, 7)])
def test_catch_up_equals_the_cpu(cuda: Any, rows: int, columns: int, momentum: bool, noise: str) -> None:
    chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[: rows // 2].sort().values
    options = {"table": 2, "step": STEP, "noise": noise, "first_row": 2**33 + 7, **skip_ahead(momentum)}
    assert_same_after(cuda.catch_up_, ops.catch_up_, state(rows, columns, momentum=momentum), chosen, KEY, **options)


def test_catch_up_passes_over_padding(cuda: Any) -> None:
    chosen = torch.tensor([2, 5, 9])
    padded = torch.cat([chosen, torch.full((40,), -1)])
    options = {"table": 2, "step": STEP, **skip_ahead(False)}
    values = state(10, 24)
    expected, found = copy(values), copy(values)
    ops.catch_up_(expected["weight"], expected["last"], chosen, KEY, **options)  # type: ignore[arg-type]
    cuda.catch_up_(found["weight"], found["last"], padded, KEY, **options)
    assert torch.equal(found["weight"], expected["weight"])
    assert torch.equal(found["last"], expected["last"])


def test_rows_that_are_up_to_date_stay_as_they_are(cuda: Any) -> None:
    values = state(30, 20)
    values["last"].fill_(STEP)
    before = values["weight"].clone()
    cuda.flush_(values["weight"], values["last"], KEY, table=0, step=STEP, **skip_ahead(False))
    assert torch.equal(values["weight"], before)


def test_flush_of_nothing(cuda: Any) -> None:
    for shape in ((0, 8), (3, 0)):
        values = {"weight": torch.empty(shape), "last": torch.zeros(shape[0], dtype=torch.int32)}
        cuda.flush_(values["weight"], values["last"], KEY, table=0, step=STEP, **skip_ahead(False))
        assert (values["last"] == STEP).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["last"].__setitem__(4, STEP + 1), "last"),
        (lambda v: v["last"].__setitem__(4, -1), "last"),
        (lambda v: v["options"].__setitem__("transition", v["options"]["transition"][:2]), "transition"),
        (lambda v: v["rows"].__setitem__(1, 30), "rows"),
        (lambda v: v["rows"].__setitem__(1, -2), "rows"),
    ],
    ids=["future", "negative", "horizon", "beyond", "below"],
)
def test_what_is_wrong_stops_the_kernel(cuda: Any, change: Callable[[dict[str, Any]], None], message: str) -> None:
    values: dict[str, Any] = state(30, 16)
    values["last"].fill_(5)
    values["rows"] = torch.tensor([3, 4, 8])
    values["options"] = {"table": 2, "step": STEP, **skip_ahead(False)}
    change(values)
    with pytest.raises(ValueError, match=message):
        cuda.catch_up_(values["weight"], values["last"], values["rows"], KEY, **values["options"])


def test_a_wrong_key_gives_other_noise(cuda: Any) -> None:
    """Negative control: the equality above does see the key."""
    address = {"table": 3, "first_row": 0, "step": 1}
    found = cuda.normal_(torch.empty(20, 24), NoiseKey.for_tests(8).tensor(), **address)
    assert not torch.equal(found, ops.normal_(torch.empty(20, 24), KEY, **address))
