"""What the tests of the kernels share: a key, the instruction sets, and the two implementations of every operator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lazydp.kernels.noise_key import NoiseKey
from support.simd import at_level


@pytest.fixture
def key() -> Tensor:
    return NoiseKey.for_tests(20240807).tensor()


@pytest.fixture(params=["portable", "avx2", "avx512"])
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of each instruction set that this machine has."""
    with at_level(request.param):
        yield request.param


@pytest.fixture(scope="module", autouse=True)
def _threads(two_threads: None) -> None:
    """Operators share their work between threads, and no result may show it."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
