"""The table of items: what is a column of a catalogue, and what the items are called; and their counts."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from lazydp.components.bundle.items import ItemTable, read
from lazydp.components.bundle.reader import _popularity
from lazydp.components.bundle.writer import POPULARITY, POPULARITY_FILE
from lazydp.components.features.catalogue import BAG_PREFIX, DENSE_COLUMN, ID_COLUMN, METADATA_PREFIX, TITLE_COLUMN
from lazydp.components.shared.errors import FormatError, NonFiniteError

COLUMNS = {
    ID_COLUMN: pa.array(["a", "b", "c"]),
    TITLE_COLUMN: pa.array(["A", None, "C"]),
    f"{METADATA_PREFIX}genre": pa.array(["x, y", "y", None]),
    f"{BAG_PREFIX}tags": pa.array([[1], [2], []]),
    DENSE_COLUMN: pa.array([[0.5], [0.0], [1.0]]),
}


def written(tmp_path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table({**COLUMNS, **columns}), tmp_path / "items.parquet")
    return tmp_path / "items.parquet"


def test_a_catalogue_is_read(tmp_path: Path) -> None:
    table = ItemTable(read(written(tmp_path), num_items=3))
    assert (len(table), table.ids, table.titles) == (3, ["a", "b", "c"], ["A", None, "C"])
    assert [table.code(name) for name in ("a", "c", "d")] == [1, 3, 0]
    assert (table.title(1), table.title(2)) == ("A", None)
    assert table.metadata(1) == {"genre": "x, y"}
    assert table.attributes == ("genre",)
    # That of most items first, and of as many by name.
    assert table.columns.choices("genre", most=2) == ("y", "x")
    assert table.columns.choices("genre", most=1) == ()
    assert table.columns.values("genre", 1) == ("x", "y")


def test_titles_that_are_all_missing_are_none(tmp_path: Path) -> None:
    table = ItemTable(read(written(tmp_path, **{TITLE_COLUMN: pa.nulls(3)}), num_items=3))
    assert table.titles is None
    assert table.title(1) is None


@pytest.mark.parametrize(
    "columns",
    [
        {"other": pa.array([1, 2, 3])},
        {ID_COLUMN: pa.array([1, 2, 3])},
        {ID_COLUMN: pa.array(["a", "b", "a"])},
        {ID_COLUMN: pa.array(["a", None, "c"])},
        {TITLE_COLUMN: pa.array([1, 2, 3])},
        {f"{METADATA_PREFIX}genre": pa.array([1, 2, 3])},
    ],
)
def test_what_is_no_catalogue_is_refused(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    with pytest.raises(FormatError):
        read(written(tmp_path, **columns), num_items=3)


def test_another_number_of_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        read(written(tmp_path), num_items=4)


def test_counts_are_of_every_item_and_finite(tmp_path: Path) -> None:
    for counts, error in ((torch.arange(4.0), None), (torch.zeros(3), FormatError), (torch.zeros(2), FormatError)):
        save_file({POPULARITY: counts}, tmp_path / POPULARITY_FILE)
        if error is None:
            assert _popularity(tmp_path, 3).tolist() == counts.tolist()
        else:
            with pytest.raises(error):
                _popularity(tmp_path, 3)
    save_file({POPULARITY: torch.tensor([0.0, 1.0, float("nan"), 2.0])}, tmp_path / POPULARITY_FILE)
    with pytest.raises(NonFiniteError):
        _popularity(tmp_path, 3)
