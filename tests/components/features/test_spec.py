"""Feature specs: what is accepted, how mistakes are told, what a model reads off them."""

from pathlib import Path

import pytest

from lazydp.components.features.spec import EmbeddedFeature, FeatureSpec
from lazydp.components.features.spec_file import parse_spec, read_spec
from lazydp.components.shared.errors import FormatError, InputError

FULL = """
format_version: 1
name: shop
user: {column: user_id, vocabulary: {kind: hashed, buckets: 100, salt: shop}}
item: {column: item_id, vocabulary: {kind: declared, values: [1, 2, "3"]}, title: title, metadata: [brand]}
timestamp: at
label: {kind: threshold, column: rating, at_least: 4}
max_examples_per_user: 8
history: {max_length: 5, pooling: sum}
users: {path: users.parquet, key: user_id}
items: {path: items.parquet, key: item_id}
features:
  - {name: device, kind: single, vocabulary: {kind: declared, values: [phone, desktop]}}
  - {name: hour, kind: dense, bounds: [0, 24]}
  - {name: region, source: user, kind: single, vocabulary: {kind: integer, size: 7}}
  - {name: likes, source: user, kind: list, table: tag, pooling: sum}
  - {name: tags, source: item, kind: list, table: tag, vocabulary: {kind: hashed, buckets: 9, salt: t}}
  - {name: price, source: item, kind: dense, bounds: [0, 500], transform: log1p}
  - {name: bought_with, source: item, kind: list, table: item, pooling: mean}
"""


def test_a_model_reads_tables_and_features_off_the_spec() -> None:
    spec = parse_spec(FULL, where="spec.yaml")
    assert spec.tables() == {"user": 101, "item": 4, "device": 3, "region": 8, "tag": 10}
    assert spec.example_features() == [
        EmbeddedFeature(name="user", table="user", num_rows=101, pooling="sum"),
        EmbeddedFeature(name="device", table="device", num_rows=3, pooling="sum"),
        EmbeddedFeature(name="region", table="region", num_rows=8, pooling="sum"),
        EmbeddedFeature(name="likes", table="tag", num_rows=10, pooling="sum"),
        EmbeddedFeature(name="history", table="item", num_rows=4, pooling="sum"),
    ]
    assert [(f.name, f.table, f.pooling) for f in spec.item_features()] == [
        ("item", "item", "sum"),
        ("tags", "tag", "mean"),
        ("bought_with", "item", "mean"),
    ]
    assert (spec.num_dense, spec.num_item_dense) == (1, 1)
    assert spec.effective_split.kind == "leave_last_out"
    assert spec.effective_selection == "latest"


def test_a_spec_survives_its_document() -> None:
    spec = parse_spec(FULL, where="spec.yaml")
    assert FeatureSpec.from_document(spec.document(), where="manifest") == spec


def test_a_broken_document_is_refused() -> None:
    document = parse_spec(FULL, where="spec.yaml").document()
    document["history"]["max_length"] = 0
    with pytest.raises(FormatError, match=r"dataset\.json.*history\.max_length"):
        FeatureSpec.from_document(document, where="dataset.json")


MISTAKES = {
    **{
        f"value written {text}": (
            "name: a\nlabel: {kind: column, column: y}\nfeatures:\n"
            f"  - {{name: f, kind: single, vocabulary: {{kind: declared, values: [{text}]}}}}\n",
            rf"s\.yaml:4: the value {text} is the number {read} in YAML: write '{text}' in quotes",
        )
        for text, read in {"007": 7, "1_000": 1000, "16:09": 969, "1.10": 1.1, "0x10": 16}.items()
    },
    "split value written 01": (
        "name: a\nlabel: {kind: column, column: y}\nsplit: {kind: column, column: s, train: 01, test: 2}\n",
        r"s\.yaml:3: the value 01 is the number 1 in YAML",
    ),
    "not yaml": ("name: [", r"s\.yaml:1: not YAML"),
    "not a mapping": ("- 1", r"expected a mapping of fields .* found list"),
    "empty": ("", "found nothing"),
    "unknown field": ("name: a\nlabel: {kind: column, column: y}\nlables: 1\n", r"s\.yaml:3: lables: .*no such field"),
    "field missing": ("name: a\n", r"s\.yaml:1: label: the field is missing"),
    "field twice": ("name: a\nname: b\n", r"s\.yaml:2: the field 'name' stands there twice"),
    "unknown kind": ("name: a\nlabel: {kind: implcit}\n", r"s\.yaml:2: label: there is no kind 'implcit'"),
    "no kind": ("name: a\nlabel: {column: y}\n", r"s\.yaml:2: label: the field kind is missing"),
    "not a mapping inside": ("name: a\nlabel: 3\n", r"s\.yaml:2: label: expected a mapping of fields, found 3"),
    "wrong type": (
        "name: a\nlabel: {kind: column, column: y}\nfeatures:\n  - name: f\n    kind: single\n    vocabulary:\n"
        "      kind: hashed\n      buckets: many\n      salt: s\n",
        r"s\.yaml:8: features\[0\]\.vocabulary\.buckets: .*found 'many'",
    ),
    "bounds reversed": (
        "name: a\nlabel: {kind: column, column: y}\nfeatures:\n  - {name: f, kind: dense, bounds: [3, 1]}\n",
        r"s\.yaml:4: features\[0\]: bounds must be finite and ascending, found \[3\.0, 1\.0\]",
    ),
    "yes and no": (
        "name: a\nlabel: {kind: column, column: y}\nfeatures:\n"
        "  - {name: f, kind: single, vocabulary: {kind: declared, values: [yes, no]}}\n",
        r"values\[0\]: .*found True: put it in quotes",
    ),
    "value twice": (
        "name: a\nlabel: {kind: column, column: y}\nfeatures:\n"
        "  - {name: f, kind: single, vocabulary: {kind: declared, values: [1, '1']}}\n",
        "value '1' is declared twice",
    ),
    "implicit without item": ("name: a\nlabel: {kind: implicit}\n", "the spec has no item"),
    "bound without user": (
        "name: a\nlabel: {kind: column, column: y}\nmax_examples_per_user: 3\n",
        "max_examples_per_user needs a user column",
    ),
    "users declare a vocabulary": (
        "name: a\nlabel: {kind: column, column: y}\n"
        "user: {column: u, vocabulary: {kind: declared, table: users}}\nusers: {path: u.parquet, key: u}\n",
        r"s\.yaml:3: user\.vocabulary\.table: .*'items'.*found 'users'",
    ),
    "hashed items": (
        "name: a\nlabel: {kind: implicit}\nitem: {column: i, vocabulary: {kind: hashed, buckets: 9, salt: s}}\n",
        r"s\.yaml:3: item\.vocabulary: there is no kind 'hashed'",
    ),
    "reserved name": (
        "name: a\nlabel: {kind: column, column: y}\nfeatures:\n  - {name: item, kind: dense, bounds: [0, 1]}\n",
        "'item' is a reserved name",
    ),
    "shared table, other vocabulary": (
        "name: a\nlabel: {kind: column, column: y}\nfeatures:\n"
        "  - {name: f, kind: single, table: t, vocabulary: {kind: integer, size: 3}}\n"
        "  - {name: g, kind: single, table: t, vocabulary: {kind: integer, size: 4}}\n",
        "features that share a table need the same vocabulary",
    ),
    "no vocabulary": (
        "name: a\nlabel: {kind: column, column: y}\nfeatures:\n  - {name: f, kind: single}\n",
        "feature 'f' needs a vocabulary",
    ),
    "newer format": ("format_version: 2\nname: a\n", "format_version 2 is newer"),
    "hostile name": ("name: ../a\nlabel: {kind: column, column: y}\n", r"s\.yaml:1: name: .*found '\.\./a'"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_name_line_and_field(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_spec(text, where="s.yaml")
    assert "\n" not in str(caught.value)


def test_values_in_quotes_and_plain_numbers_are_taken_as_they_stand() -> None:
    text = (
        "name: a\nlabel: {kind: column, column: y}\nfeatures:\n"
        "  - {name: f, kind: single, vocabulary: {kind: declared, values: ['007', 7, -1, 2.5, a]}}\n"
    )
    (vocabulary,) = parse_spec(text, where="s.yaml").vocabularies().values()
    assert vocabulary.values == ("007", "7", "-1", "2.5", "a")  # type: ignore[union-attr]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no feature spec at .*nowhere\.yaml"):
        read_spec(tmp_path / "nowhere.yaml")


def test_sizes_of_lists_outside_the_spec_are_not_guessed() -> None:
    text = "name: a\nlabel: {kind: implicit}\nitem: {column: i, vocabulary: {kind: declared, file: items.txt}}\n"
    with pytest.raises(InputError, match=r"items\.txt has not been read"):
        parse_spec(text, where="s.yaml").tables()


def test_a_misspelt_field_is_told_what_it_may_have_been() -> None:
    with pytest.raises(InputError, match="timestmap: there is no such field; did you mean 'timestamp'"):
        parse_spec("name: a\ntimestmap: t\nlabel: {kind: implicit}\n", where="s.yaml")
    with pytest.raises(InputError, match=r"no such field$"):
        parse_spec("name: a\nzzzz: t\nlabel: {kind: implicit}\n", where="s.yaml")
