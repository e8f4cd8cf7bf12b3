"""Bags, batches and the catalogue."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazydp.components.features.batch import Bags, Batch, ItemCatalogue

LISTS = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6)


def bags_of(lists: list[list[int]]) -> Bags:
    lengths = torch.tensor([0, *map(len, lists)])
    return Bags(torch.tensor([value for part in lists for value in part], dtype=torch.int64), lengths.cumsum(0))


def lists_of(bags: Bags) -> list[list[int]]:
    return [part.tolist() for part in torch.tensor_split(bags.values, bags.offsets[1:-1])] if bags.size else []


@given(LISTS, st.data())
def test_taking_bags_is_taking_lists(lists: list[list[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8))
    taken = bags_of(lists).take(torch.tensor(rows, dtype=torch.int64))
    assert lists_of(taken) == [lists[row] for row in rows]
    assert taken.lengths().tolist() == [len(lists[row]) for row in rows]


def test_a_batch_takes_its_parts_together() -> None:
    batch = Batch(
        size=3,
        labels=torch.tensor([0.0, 1.0, 1.0]),
        dense=torch.arange(6.0).reshape(3, 2),
        bags={"history": bags_of([[1], [], [2, 3]])},
        item=torch.tensor([4, 5, 6]),
        user_index=None,
    )
    part = batch.take(torch.tensor([2, 0])).to("cpu")
    assert part.labels.tolist() == [1.0, 0.0]
    assert part.dense.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert lists_of(part.bags["history"]) == [[2, 3], [1]]
    assert part.item is not None
    assert part.item.tolist() == [6, 4]
    assert part.user_index is None
    assert batch.take(torch.empty(0, dtype=torch.int64)).size == 0


def test_parts_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="dense: expected 2 examples, found 3"):
        Batch(size=2, labels=torch.zeros(2), dense=torch.zeros(3, 0), bags={}, item=None, user_index=None)
    with pytest.raises(ValueError, match="offsets: expected int64"):
        Bags(torch.zeros(1, dtype=torch.int64), torch.zeros(2))


def test_the_catalogue_answers_codes_of_any_shape() -> None:
    catalogue = ItemCatalogue(
        num_items=2, dense=torch.tensor([[0.0], [1.0], [2.0]]), bags={"tags": bags_of([[], [7], [8, 9]])}
    )
    dense, bags = catalogue.to("cpu").take(torch.tensor([[2, 0], [1, 2]]))
    assert dense.tolist() == [[[2.0], [0.0]], [[1.0], [2.0]]]
    assert lists_of(bags["tags"]) == [[8, 9], [], [7], [8, 9]]
    with pytest.raises(ValueError, match=r"bags\['tags'\]: expected 4 bags, found 3"):
        ItemCatalogue(num_items=3, dense=torch.zeros(4, 1), bags={"tags": catalogue.bags["tags"]})
