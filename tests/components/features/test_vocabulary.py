"""Vocabularies: codes are stable, and do not depend on how a value is stored."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazydp.components.features.spec_file import parse_spec
from lazydp.components.features.values import canonical_text, to_numbers
from lazydp.components.features.vocabulary import Vocabularies, check_values, hash_code, make_vocabulary, values_digest
from lazydp.components.features.vocabulary_spec import (
    BucketVocabulary,
    DeclaredVocabulary,
    HashedVocabulary,
    IntegerVocabulary,
)
from lazydp.components.shared.errors import FormatError, InputError, IntegrityError

DECLARED = make_vocabulary(DeclaredVocabulary(kind="declared", values=("1", "b", "2.5")))
HASHED = make_vocabulary(HashedVocabulary(kind="hashed", buckets=1000, salt="golden"))
INTEGERS = make_vocabulary(IntegerVocabulary(kind="integer", first=-1, size=4))
BUCKETS = make_vocabulary(BucketVocabulary(kind="buckets", boundaries=(18, 25)))


def test_hashes_never_change() -> None:
    # Golden values: a bundle made by any version must be served by every later one.
    assert HASHED.encode(["u1", 42, "Ünïcode", "u1", None]).tolist() == [958, 325, 611, 958, 0]
    assert hash_code("u1", buckets=2**31 - 2, salt="x" * 64) == 1615110840
    assert hash_code("u1", buckets=10**9, salt="é" * 64) == 697274729


def test_another_salt_gives_other_codes() -> None:
    other = make_vocabulary(HashedVocabulary(kind="hashed", buckets=1000, salt="other"))
    values = [str(number) for number in range(100)]
    assert (HASHED.encode(values) != other.encode(values)).mean() > 0.9


def test_hashed_codes_are_spread_evenly() -> None:
    counts = np.bincount(HASHED.encode([str(number) for number in range(100_000)]), minlength=1001)
    assert counts[0] == 0
    assert len(counts) == 1001
    # Chi-squared of 1000 buckets has mean 999 and deviation 45.
    assert abs(((counts[1:] - 100) ** 2 / 100).sum() - 999) < 5 * 45


@pytest.mark.parametrize(
    "array",
    [
        pa.array([5, 0, None], pa.int64()),
        pa.array([5, 0, None], pa.uint8()),
        pa.array([5.0, -0.0, float("nan")]),
        pa.array(["5", "0", None]),
        pa.array(["5", "0", ""], pa.large_string()),
        pa.array(["5", "0", None]).dictionary_encode(),
        pa.chunked_array([pa.array(["5"]), pa.array(["0", None])]),
    ],
    ids=lambda array: str(array.type),
)
def test_the_storage_of_a_value_does_not_matter(array: pa.Array) -> None:
    assert canonical_text(array).to_pylist() == ["5", "0", None]
    assert HASHED.encode(array).tolist() == HASHED.encode(["5", "0", None]).tolist()
    for vocabulary in (HASHED, INTEGERS, DECLARED, BUCKETS):
        assert vocabulary.encode_column(array).tolist() == vocabulary.encode(["5", "0", None]).tolist()
        assert vocabulary.encode_column(array).dtype == np.int32
    assert INTEGERS.encode(array).tolist() == [0, 2, 0]
    np.testing.assert_array_equal(to_numbers(array), [5, 0, np.nan])


def test_codes_of_declared_values_and_of_others() -> None:
    assert DECLARED.encode(["b", 1, 2.5, "c", None]).tolist() == [2, 1, 3, 0, 0]
    assert DECLARED.encode([]).tolist() == []
    assert DECLARED.encode(pa.nulls(2)).tolist() == [0, 0]
    assert INTEGERS.encode([-2, -1, 2, 3, 2**62]).tolist() == [0, 1, 4, 0, 0]
    assert INTEGERS.encode(["-1", "2", "1.0", "x", "9" * 30]).tolist() == [1, 4, 0, 0, 0]
    # Another text is another value, here as in the other vocabularies: "+2" is not the user, or the item, "2".
    assert INTEGERS.encode(["+2", "02", "-0", "+0", "00", "-01", " 2", "2\n", "٢"]).tolist() == [0] * 9
    assert DECLARED.encode(["+1", "01"]).tolist() == [0, 0]
    assert INTEGERS.encode(pa.array([2**64 - 1, 2], pa.uint64())).tolist() == [0, 4]
    assert BUCKETS.encode([17.9, 18, 24, 25, None, "x"]).tolist() == [1, 2, 2, 3, 0, 0]


def test_values_can_be_listed_in_code_order() -> None:
    for vocabulary in (DECLARED, INTEGERS):
        values = vocabulary.values()
        assert values is not None
        assert vocabulary.encode(values).tolist() == list(range(1, vocabulary.size + 1))
    assert HASHED.values() is None


@given(st.lists(st.one_of(st.none(), st.text(), st.integers(), st.floats())))
def test_codes_lie_in_range_whatever_comes(values: list[object]) -> None:
    for vocabulary in (DECLARED, HASHED, INTEGERS, BUCKETS):
        codes = vocabulary.encode(
            [value if not isinstance(value, str) else value.encode("utf-8", "replace").decode() for value in values]
        )
        assert codes.shape == (len(values),)
        assert codes.dtype == np.int64
        assert ((codes >= 0) & (codes <= vocabulary.size)).all()


def test_numbers_are_read_from_text() -> None:
    found = to_numbers(["1", "+2.5", "-1e3", ".5", "x", "", None, "1 "])
    np.testing.assert_array_equal(found, [1, 2.5, -1000, 0.5, np.nan, np.nan, np.nan, np.nan])


def test_nested_values_are_refused() -> None:
    with pytest.raises(ValueError, match="expected single values, found list"):
        canonical_text(pa.array([[1]]))
    with pytest.raises(ValueError, match="cannot be read as text"):
        canonical_text(pa.array([b"\xff"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "found none"), (["a", None], "value 2 is missing"), (["a", "b", "a"], "'a' stands there 2")],
)
def test_lists_need_distinct_values(values: list[str | None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_values(pa.array(values, pa.string()), where="list")


def _spec_with_list(values: pa.Array) -> tuple[object, dict[str, pa.Array]]:
    text = (
        "name: a\nlabel: {kind: implicit}\n"
        f"item: {{column: i, vocabulary: {{kind: declared, file: items.txt, size: {len(values)}, "
        f"sha256: {values_digest(values)}}}}}\n"
    )
    return parse_spec(text, where="s"), {"item": values}


def test_lists_survive_saving(tmp_path: Path) -> None:
    spec, lists = _spec_with_list(pa.array(["x", "y", "z"]))
    Vocabularies(spec, lists).save(tmp_path)  # type: ignore[arg-type]
    loaded = Vocabularies.load(spec, tmp_path)  # type: ignore[arg-type]
    assert loaded["item"].encode(["z", "x", "w"]).tolist() == [3, 1, 0]
    assert list(loaded) == ["item"]


def test_a_changed_or_missing_list_is_refused(tmp_path: Path) -> None:
    spec, lists = _spec_with_list(pa.array(["x", "y", "z"]))
    with pytest.raises(FormatError, match="cannot be read"):
        Vocabularies.load(spec, tmp_path)  # type: ignore[arg-type]
    Vocabularies(spec, lists).save(tmp_path)  # type: ignore[arg-type]
    pq.write_table(pa.table({"value": ["x", "z", "y"]}), tmp_path / "item.parquet")
    with pytest.raises(IntegrityError, match="differs from the list"):
        Vocabularies.load(spec, tmp_path)  # type: ignore[arg-type]
