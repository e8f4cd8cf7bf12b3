"""Settings of a run that several processes may train together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lazydp.components.shared.frozen_model import FrozenModel

MOST_LANES = 512


def _power_of_two(number: int) -> int:
    if number & (number - 1):
        raise ValueError(f"expected a power of two, found {number}")
    return number


class DistributedSettings(FrozenModel):
    """How a run is laid out so that any number of ranks computes the same model, to the bit.

    All of it belongs to the run: it may be resumed on another number of ranks, and not with other settings.

    Attributes:
        lanes: slices of a batch that are computed apart, a power of two. The number of ranks divides it.
        placement: where rows lie, `spread` or `ordered` (`train.ranks.places`). `spread` gives every rank rows that are
            read equally often, also where codes ascend with falling popularity.
    """

    lanes: Annotated[int, Field(ge=1, le=MOST_LANES), AfterValidator(_power_of_two)] = 8
    placement: Literal["spread", "ordered"] = "spread"
