"""From a log and a catalogue never seen before to a dataset and its profile, without a line of YAML by hand."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from lazydp.components.commands.dataset_cli import command as dataset_command
from lazydp.components.commands.init_cli import command as init
from lazydp.components.features.spec_file import read_spec
from lazydp.components.ingest.cli import command as ingest
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.plan.plan import plan
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    rows = [
        f"{user},{item},{user * 7 + item}" for user in range(20) for item in generator.permutation(12)[: 3 + user % 6]
    ]
    (tmp_path / "clicks.csv").write_text("Customer ID,product,event time\n" + "\n".join(rows) + "\n")
    items = "".join(f'{item},"Thing, {item}",kind {item % 3}\n' for item in range(12))
    (tmp_path / "products.csv").write_text("product,name,no,2nd kind\n".replace("no,", "") + items)
    return tmp_path


def run(command: object, *arguments: str) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])  # type: ignore[arg-type]


def test_from_two_csv_files_to_a_profile(folder: Path) -> None:
    sizes = ["--users", "20", "--interactions", "100"]
    made = run(init, "--input", "clicks.csv", "--items", "products.csv", *sizes)
    assert made.exit_code == 0, made.output
    spec = read_spec(folder / "spec.yaml")
    assert spec.user is not None
    assert spec.item is not None
    assert (spec.user.column, spec.item.column, spec.timestamp) == ("Customer ID", "product", "event time")
    assert (spec.item.title, spec.max_examples_per_user) == ("name", 8)
    assert [(feature.name, feature.column_name) for feature in spec.features] == [("c_2nd_kind", "2nd kind")]
    config = TrainConfig.load(folder / "train.yaml")
    planned = plan(users=20, items=12, epsilon=8, delta=config.target_delta or 0.0)
    assert config == planned.config
    assert config.start is not None
    assert config.steps == 0

    common = ["--input", "clicks.csv", "--spec", "spec.yaml"]
    checked = run(ingest, *common, "--check")
    assert checked.exit_code == 0, checked.output
    assert "catalogue: 12 items" in checked.output
    assert "  0: Thing, 0" in checked.output
    assert "nothing was written" in checked.output
    assert not (folder / "data").exists()
    assert run(ingest, *common).exit_code == 2  # neither --out nor --check
    assert run(ingest, *common, "--out", "data").exit_code == 0

    shown = run(dataset_command, "show", "data", "--html", "profile.html")
    assert shown.exit_code == 0, shown.output
    counts = EncodedDataset.open(folder / "data").manifest.counts
    assert f"{counts.train:,}" in shown.output
    assert "private" in shown.output.splitlines()[0]
    page = (folder / "profile.html").read_text()
    assert "Private" in html.unescape(page)
    assert "http" not in page
    assert (folder / "profile.html").stat().st_mode & 0o077 == 0


def test_what_is_there_is_kept(folder: Path) -> None:
    (folder / "spec.yaml").write_text("mine")
    made = run(init, "--input", "clicks.csv", "--items", "products.csv", "--users", "9", "--interactions", "9")
    assert isinstance(made.exception, InputError)
    assert "is there already" in str(made.exception)
    assert (folder / "spec.yaml").read_text() == "mine"
    assert not (folder / "train.yaml").exists()


def test_no_value_decides_anything(folder: Path) -> None:
    """Two logs of the same columns and types give the same files, to the letter."""
    texts = []
    for number, users in enumerate((["a", "b"], ["x" * 50, "secret"])):
        pq.write_table(pa.table({"user": users, "item": [1, 2], "age": [3, 4]}), folder / "log.parquet")
        out = folder / f"out{number}"
        made = run(
            init,
            "--input",
            "log.parquet",
            "--item-count",
            "9",
            "--users",
            "9",
            "--interactions",
            "99",
            "--out",
            out,  # type: ignore[arg-type]
        )
        assert made.exit_code == 0, made.output
        texts.append((out / "spec.yaml").read_text() + (out / "train.yaml").read_text())
    assert texts[0] == texts[1]
    assert "secret" not in texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "products.csv", "--items", "products.csv"], "no column of .* has a name that says user"),
        (["--input", "clicks.csv"], "give the catalogue"),
        (["--input", "clicks.csv", "--items", "products.csv", "--user", "who"], "has no column 'who'"),
        (["--input", "clicks.csv", "--items", "clicks.csv", "--item", "event time"], None),
    ],
)
def test_what_names_do_not_say_is_asked_for(folder: Path, arguments: list[str], message: str | None) -> None:
    made = run(init, *arguments, "--users", "9", "--interactions", "9")
    if message is None:
        assert made.exit_code == 0
        assert read_spec(folder / "spec.yaml").items.key == "event time"  # type: ignore[union-attr]
    else:
        assert isinstance(made.exception, InputError)
        with pytest.raises(InputError, match=message):
            raise made.exception


@pytest.mark.parametrize("users", [1, 900, 40_000, 3_000_000, 10**9])
@pytest.mark.parametrize("unit", ["user", "example"])
def test_configurations_are_valid_at_every_size(folder: Path, users: int, unit: str) -> None:
    sizes = ["--users", str(users), "--interactions", str(users * 30), "--privacy-unit", unit]
    made = run(init, "--input", "clicks.csv", "--items", "products.csv", *sizes)
    assert made.exit_code == 0, made.output
    config = TrainConfig.load(folder / "train.yaml")
    assert config.target_delta is not None
    assert config.target_delta * users <= 0.1
    assert (config.privacy_unit, config.steps) == (unit, 0)
    assert yaml.safe_load((folder / "spec.yaml").read_text())["max_examples_per_user"] == 32


def test_the_profile_says_what_other_bounds_keep(folder: Path) -> None:
    spec = "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\nsplit: {kind: none}\n"
    spec += "item: {column: i, vocabulary: {kind: integer, size: 4}}\nmax_examples_per_user: 2\n"
    (folder / "s.yaml").write_text(spec)
    pq.write_table(pa.table({"u": [1] * 8 + [2, 3], "i": [0, 1] * 5}), folder / "log.parquet")
    assert run(ingest, "--input", "log.parquet", "--spec", "s.yaml", "--out", "d").exit_code == 0
    shown = run(dataset_command, "show", "d").output
    found = {" ".join(line.split()[:-1]): line.split()[-1] for line in shown.splitlines() if line.startswith("  ")}
    assert found["a bound of 1 keeps of the positive rows"] == "30.0%"
    assert found["a bound of 2 keeps of the positive rows"] == "40.0%"
    assert found["a bound of 8 keeps of the positive rows"] == "100.0%"
    assert found["smallest of these that keeps 90%"] == "8"
    assert found["users at the bound of 2"] == "33.3%"
    assert found["training rows that the bound drops"] == "60.0%"
    assert found["items without a training example"] == "50.0%"
