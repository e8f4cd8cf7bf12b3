"""Columns to codes: lists, text with separators, dense features; requests; the catalogue table."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lazydp.components.features.catalogue import catalogue_table
from lazydp.components.features.encode import CodeLists, encode_list, scale_dense, split_text
from lazydp.components.features.item_tensors import item_catalogue
from lazydp.components.features.request import encode_requests
from lazydp.components.features.spec import DenseFeature, FeatureSpec, ListFeature
from lazydp.components.features.spec_file import parse_spec
from lazydp.components.features.vocabulary import Vocabularies, make_vocabulary
from lazydp.components.features.vocabulary_spec import IntegerVocabulary
from lazydp.components.shared.errors import FormatError, InputError

DIGITS = make_vocabulary(IntegerVocabulary(kind="integer", first=1, size=9))
PLAIN = ListFeature(name="f", kind="list")


def as_lists(lists: CodeLists) -> list[list[int]]:
    return [part.tolist() for part in np.split(lists.values, lists.offsets()[1:-1])]


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.string()), pa.list_(pa.float32())])
def test_lists_keep_order_and_lose_missing_values(kind: pa.DataType) -> None:
    text = pa.types.is_string(kind.value_type)
    raw = [[1, 2], None, [], [3, None, 99, 3]]
    values = [None if part is None else [None if v is None else str(v) if text else v for v in part] for part in raw]
    assert as_lists(encode_list(PLAIN, DIGITS, pa.array(values, kind))) == [[1, 2], [], [], [3, 0, 3]]


def test_lists_of_fixed_size_and_slices_of_lists() -> None:
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2))
    assert as_lists(encode_list(PLAIN, DIGITS, fixed)) == [[1, 2], [], [3, 4]]
    assert as_lists(encode_list(PLAIN, DIGITS, pa.array([[1], [2, 3], [4]]).slice(1))) == [[2, 3], [4]]


def test_text_is_cut_at_the_separator() -> None:
    feature = ListFeature(name="f", kind="list", separator="|", max_length=2)
    values = pa.array(["1|2", "3||4|5", "", None, "x"])
    assert as_lists(encode_list(feature, DIGITS, values)) == [[1, 2], [3, 4], [], [], [0]]
    assert split_text(["a b"], " ").to_pylist() == [["a", "b"]]
    with pytest.raises(ValueError, match="expected lists"):
        encode_list(PLAIN, DIGITS, pa.array(["1|2"]))


def test_dense_features_are_clipped_and_scaled_by_their_bounds() -> None:
    linear = DenseFeature(name="d", kind="dense", bounds=(0, 10))
    values = pa.array([0.0, 5, 10, -3, 99, np.inf, np.nan, None], from_pandas=False)
    np.testing.assert_allclose(scale_dense(linear, values), [-1, 0, 1, -1, 1, 1, 0, 0])
    log = DenseFeature(name="d", kind="dense", bounds=(0, 99), transform="log1p")
    np.testing.assert_allclose(scale_dense(log, ["0", "9", "99", "x"]), [-1, 0, 1, 0], atol=1e-7)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.int64(), pa.uint64()])
@pytest.mark.parametrize("transform", ["linear", "log1p"])
def test_integers_are_scaled_as_the_floats_that_they_are(kind: pa.DataType, transform: Any) -> None:
    """Many of few different ones are scaled once each, others and few ones by themselves: to the bit the same."""
    feature = DenseFeature(name="d", kind="dense", bounds=(2, 50), transform=transform)
    generator = np.random.default_rng(0)
    values = [None if value > 100 else value for value in generator.integers(0, 111, 5000).tolist()]
    floats = scale_dense(feature, pa.array(values, pa.float64()))
    assert scale_dense(feature, pa.array(values, kind)[3:]).tolist() == floats[3:].tolist()
    assert scale_dense(feature, pa.array(values[:50], kind)).tolist() == floats[:50].tolist()
    assert scale_dense(feature, pa.array([None] * 2000, kind)).tolist() == [0] * 2000
    far = [0, *[value and value * 10**6 for value in values]] if kind.bit_width > 8 else values
    assert (
        scale_dense(feature, pa.array(far, kind)).tolist() == scale_dense(feature, pa.array(far, pa.float64())).tolist()
    )


SPEC = parse_spec(
    """
name: shop
user: {column: u, vocabulary: {kind: integer, size: 5}}
item: {column: i, vocabulary: {kind: declared, values: [a, b, c]}, title: title, metadata: [tags]}
label: {kind: implicit}
history: {max_length: 2}
users: {path: u.csv, key: u}
items: {path: i.csv, key: id}
features:
  - {name: age, source: user, kind: dense, bounds: [0, 100]}
  - {name: likes, source: user, kind: list, vocabulary: {kind: declared, values: [x, y]}}
  - {name: device, kind: single, vocabulary: {kind: declared, values: [phone]}}
  - {name: tags, source: item, kind: list, table: likes}
  - {name: price, source: item, kind: dense, bounds: [0, 10]}
""",
    where="spec",
)
VOCABULARIES = Vocabularies(SPEC, {})


def test_requests_become_a_batch() -> None:
    batch = encode_requests(
        SPEC,
        VOCABULARIES,
        users=[3, None, "77"],
        histories=[["a", "b", "nothing", "c"], [], ["b"]],
        features=[{"age": 50, "likes": ["y", "z"], "device": "phone"}, {}, {"age": "x", "likes": None}],
    )
    assert batch.size == 3
    assert list(batch.bags) == [feature.name for feature in SPEC.example_features()]
    assert batch.bags["user"].values.tolist() == [4, 0, 0]
    assert batch.bags["history"].offsets.tolist() == [0, 2, 2, 3]
    assert batch.bags["history"].values.tolist() == [2, 3, 2]
    assert batch.bags["likes"].values.tolist() == [2, 0]
    assert batch.bags["likes"].offsets.tolist() == [0, 2, 2, 2]
    assert batch.bags["device"].values.tolist() == [1, 0, 0]
    assert batch.dense.tolist() == [[0.0], [0.0], [0.0]]
    assert encode_requests(SPEC, VOCABULARIES, users=[], histories=[]).size == 0


def test_a_request_of_the_wrong_kind_is_told() -> None:
    with pytest.raises(InputError, match="feature 'likes': expected lists"):
        encode_requests(SPEC, VOCABULARIES, users=[1], histories=[[]], features=[{"likes": "x"}])
    with pytest.raises(InputError, match="feature 'device': expected single values"):
        encode_requests(SPEC, VOCABULARIES, users=[1], histories=[[]], features=[{"device": ["phone"]}])
    with pytest.raises(InputError, match="as many histories"):
        encode_requests(SPEC, VOCABULARIES, users=[1], histories=[])


ITEMS = pa.table(
    {
        "id": ["c", "nobody", "a"],
        "title": ["C!", "N", "A!"],
        "tags": [["x"], ["y"], ["y", "x"]],
        "price": [10.0, 1.0, None],
    }
)


def test_the_catalogue_stands_in_code_order() -> None:
    table = catalogue_table(SPEC, VOCABULARIES, ITEMS)
    assert table.column("item").to_pylist() == ["a", "b", "c"]
    assert table.column("title").to_pylist() == ["A!", None, "C!"]
    assert table.column("metadata:tags").to_pylist() == ["y, x", None, "x"]
    catalogue = item_catalogue(SPEC, table)
    assert catalogue.num_items == 3
    assert catalogue.dense.tolist() == [[0.0], [0.0], [0.0], [1.0]]
    assert catalogue.bags["item"].values.tolist() == [0, 1, 2, 3]
    assert catalogue.bags["tags"].offsets.tolist() == [0, 0, 2, 2, 3]
    assert catalogue.bags["tags"].values.tolist() == [2, 1, 1]


def test_items_have_ids_that_can_be_asked_for() -> None:
    for length, fits in ((256, True), (257, False)):
        document = SPEC.model_dump(mode="json")
        document["item"]["vocabulary"] = {"kind": "declared", "values": ["a", "b" * length]}
        document["items"] = None
        document["features"] = []
        document["item"] |= {"title": None, "metadata": []}
        spec = FeatureSpec.model_validate(document)
        if fits:
            assert len(catalogue_table(spec, Vocabularies(spec, {}), None)) == 2
            continue
        with pytest.raises(InputError, match="an id has 257 characters; ids may have up to 256"):
            catalogue_table(spec, Vocabularies(spec, {}), None)


def test_a_catalogue_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="item 'a' stands there more than once"):
        catalogue_table(SPEC, VOCABULARIES, pa.concat_tables([ITEMS, ITEMS.slice(2)]))
    table = catalogue_table(SPEC, VOCABULARIES, ITEMS)
    with pytest.raises(FormatError, match="has 2 items, its feature spec 3"):
        item_catalogue(SPEC, table.slice(1))
    with pytest.raises(FormatError, match="no column 'bag:tags'"):
        item_catalogue(SPEC, table.drop_columns(["bag:tags"]))
