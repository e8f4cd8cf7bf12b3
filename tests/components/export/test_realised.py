"""How much of a step's noise arrives: all of it, in one float or in two, and a loss is refused."""

import math

import pytest
import torch

from lazydp.components.export.realised import SAMPLED_ROWS, realised_noise
from lazydp.components.shared.errors import PrivacyError
from lazydp.components.train.tables.precision import Rounding
from lazydp.components.train.tables.schedules import constant
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

KEY = NoiseKey.for_tests(5)
NOISE = 1e-3


def rounding(rate: float = 1.0) -> Rounding:
    return Rounding(EmbeddingSgd(constant(rate)), bound=NOISE, noise_scale=NOISE)


def weights(size: float, *, rows: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"item": torch.randn(rows, 8, generator=generator) * size, "user": torch.randn(50, 8, generator=generator)}


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4], ids=["small", "as usual", "in two floats"])
def test_noise_that_arrives(size: float) -> None:
    given = weights(size)
    before = {name: weight.clone() for name, weight in given.items()}
    assert rounding().begins_with_two(given["item"]) == (size > 10.0)
    found = realised_noise(given, rounding=rounding(), key=KEY, step=3)
    assert found is not None
    assert found.elements == (SAMPLED_ROWS + 50) * 8
    assert found.standard_error == math.sqrt(2.0 / found.elements)
    assert abs(found.variance - 1.0) < 5 * found.standard_error
    # The release itself is left alone, and the same again says the same.
    assert all(torch.equal(given[name], before[name]) for name in given)
    assert realised_noise(given, rounding=rounding(), key=KEY, step=3) == found
    assert realised_noise(given, rounding=rounding(), key=KEY, step=4) != found


def test_noise_that_is_lost_is_refused() -> None:
    """Two floats hold 48 bits: beside 1e14 they round a thousandth away."""
    with pytest.raises(PrivacyError, match="noise is lost to rounding"):
        realised_noise(weights(1e14), rounding=rounding(), key=KEY, step=3)


def test_where_no_step_has_noise_there_is_nothing_to_say() -> None:
    assert realised_noise(weights(1.0), rounding=rounding(rate=0.0), key=KEY, step=3) is None
    assert realised_noise({}, rounding=rounding(), key=KEY, step=3) is None
