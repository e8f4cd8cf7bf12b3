"""Where rows lie, and how evenly ranks are asked for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazydp.components.shared.errors import InputError
from lazydp.components.train.ranks.places import Arrangement, Places, shard


@given(num_rows=st.integers(1, 3000), arrangement=st.sampled_from(["spread", "ordered"]))
def test_places_are_a_permutation_that_by_row_undoes(num_rows: int, arrangement: Arrangement) -> None:
    places = Places.of_table(num_rows, arrangement)
    rows = torch.arange(num_rows)
    found = places.of(rows)
    assert torch.equal(found.sort().values, rows)
    by_place = torch.empty(num_rows, 2)
    by_place[found] = torch.stack([rows, -rows], dim=1).float()
    assert torch.equal(places.by_row(by_place)[:, 0], rows.float())


@given(num_places=st.integers(0, 100), ranks=st.integers(1, 12))
def test_shards_cover_every_place_once(num_places: int, ranks: int) -> None:
    owned = [shard(num_places, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [place for own in owned for place in own] == list(range(num_places))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_a_product_of_row_and_factor_stays_an_int64() -> None:
    num_rows = 2**31 - 1
    places = Places.of_table(num_rows, "spread")
    rows = torch.tensor([0, 1, num_rows - 1])
    assert places.of(rows).tolist() == [row * places.factor % num_rows for row in rows.tolist()]
    with pytest.raises(InputError, match=r"fewer than 2\^31 rows, found 2147483648"):
        Places.of_table(2**31, "ordered")


def load(arrangement: Arrangement, *, num_rows: int, ranks: int, lookups: int) -> float:
    """Distinct rows that the busiest rank serves in a step, over the mean; rows are drawn with Zipf frequencies."""
    frequencies = 1.0 / np.arange(1, num_rows + 1) ** 1.05
    generator = np.random.default_rng(1)
    starts = [shard(num_rows, rank=rank, ranks=ranks).start for rank in range(1, ranks)]
    served = np.zeros(ranks)
    for _ in range(ranks):  # what each rank reads
        drawn = np.searchsorted(np.cumsum(frequencies / frequencies.sum()), generator.random(lookups))
        read = Places.of_table(num_rows, arrangement).of(torch.from_numpy(np.unique(drawn)))
        served += np.bincount(np.searchsorted(starts, read.numpy(), side="right"), minlength=ranks)
    return float(served.max() / served.mean())


@pytest.mark.parametrize("num_rows", [200_000, 1_000_000])
def test_spread_rows_are_asked_for_evenly(num_rows: int) -> None:
    assert load("spread", num_rows=num_rows, ranks=8, lookups=8192) <= 1.1
    # The control: where codes ascend with falling popularity, the first rank is asked for most rows.
    assert load("ordered", num_rows=num_rows, ranks=8, lookups=8192) > 4
