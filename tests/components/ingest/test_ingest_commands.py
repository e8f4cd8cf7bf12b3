"""`lazydp ingest` and the component: thin shells around one function."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from lazydp.components.ingest.cli import command
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.sample.sample import SampleSize, make_sample
from lazydp.components.shared.errors import InputError
from lazydp.pipelines.cli import main

SPEC = "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\nmax_examples_per_user: 2\n"
SPEC += "item: {column: i, vocabulary: {kind: integer, size: 3}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"u": [1] * 5 + [2, None], "i": [0, 1, 2, 0, 9, 1, 1]}), tmp_path / "log.parquet")
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def arguments_for(folder: Path) -> list[str]:
    named = {"--input": folder / "log.parquet", "--spec": folder / "spec.yaml", "--out": folder / "d"}
    return [word for option, path in named.items() for word in (option, str(path))]


def test_the_command_says_what_it_made(folder: Path) -> None:
    arguments = [
        "--input",
        str(folder / "log.parquet"),
        "--spec",
        str(folder / "spec.yaml"),
        "--out",
        str(folder / "d"),
    ]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "3 examples for training and 1 for evaluation, 2 users, 3 items" in result.output
    assert "contribution bound: 2 training examples a user" in result.output
    for line in ("1 rows, null_user", "1 rows, unknown_item", "1 rows, over_max_examples_per_user"):
        assert f"left out: {line}" in result.output
    assert EncodedDataset.open(folder / "d").manifest.fingerprint in result.output


def test_a_mistake_ends_with_one_line_and_status_1(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ingest", "--input", "nowhere.parquet", "--spec", str(folder / "spec.yaml"), "--out", str(folder / "d")])
    assert caught.value.code == 1
    assert capfd.readouterr().err.strip() == "lazydp: nowhere.parquet does not exist"


@pytest.mark.parametrize(("text", "status"), [("512m", 0), ("1.5g", 2), ("0", 2), ("2 GiB", 0), ("lots", 2)])
def test_sizes(folder: Path, text: str, status: int) -> None:
    arguments = [
        "--input",
        str(folder / "log.parquet"),
        "--spec",
        str(folder / "spec.yaml"),
        "--out",
        str(folder / "d"),
    ]
    assert CliRunner().invoke(command, [*arguments, "--memory", text]).exit_code == status


def test_the_component_calls_the_same_function(folder: Path) -> None:
    dsl = pytest.importorskip("kfp.dsl")
    from lazydp.components.ingest.component import ingest

    artifact = dsl.Dataset(uri=str(folder / "artifact"))
    artifact.path = str(folder / "artifact")
    page = dsl.HTML(uri=str(folder / "page.html"))
    page.path = str(folder / "page.html")
    ingest.python_func(input_uri=str(folder / "log.parquet"), spec=SPEC, dataset=artifact, page=page)
    dataset = EncodedDataset.open(folder / "artifact")
    assert artifact.metadata == {}
    assert dataset.manifest.counts.train == 3


def test_replace_takes_a_dataset_and_nothing_else(folder: Path) -> None:
    assert CliRunner().invoke(command, arguments_for(folder)).exit_code == 0
    assert CliRunner().invoke(command, [*arguments_for(folder), "--replace"]).exit_code == 0
    shutil.rmtree(folder / "d")
    (folder / "d").mkdir()
    (folder / "d" / "thesis.txt").write_text("years of work")
    refused = CliRunner().invoke(command, [*arguments_for(folder), "--replace"])
    assert isinstance(refused.exception, InputError)
    assert "holds no dataset.json" in str(refused.exception)
    assert (folder / "d" / "thesis.txt").read_text() == "years of work"


def test_replace_keeps_a_sample_folder_with_other_things(tmp_path: Path) -> None:
    small = SampleSize(users=20, items=30, interactions=100)
    make_sample(tmp_path / "s", size=small)
    make_sample(tmp_path / "s", size=small, replace=True)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        make_sample(tmp_path / "s", size=small, replace=True)


def test_an_output_that_cannot_be_made_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = arguments_for(folder)
    arguments[-1] = str(folder / "spec.yaml" / "d")
    with pytest.raises(SystemExit) as caught:
        main(["ingest", *arguments])
    assert caught.value.code == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(f"lazydp: {folder / 'spec.yaml'}")


@pytest.mark.parametrize(("size", "warns"), [(1, True), (9, False)])
def test_a_spec_that_loses_many_rows_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture, size: int, warns: bool
) -> None:
    text = "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\nmax_examples_per_user: 2\n"
    (folder / "spec.yaml").write_text(text + f"item: {{column: i, vocabulary: {{kind: integer, size: {size}}}}}\n")
    assert CliRunner().invoke(command, arguments_for(folder)).exit_code == 0
    assert ("does the item vocabulary cover the catalogue?" in caplog.text) is warns


@pytest.mark.parametrize(("more", "status"), [([], 1), (["--max-rejected", "1"], 0)])
def test_ratings_as_labels_are_refused(folder: Path, more: list[str], status: int) -> None:
    pq.write_table(pa.table({"u": [1, 2, 3, 4], "i": [0] * 4, "r": [1, 4, 5, 3]}), folder / "log.parquet")
    (folder / "spec.yaml").write_text(SPEC.replace("{kind: implicit}", "{kind: column, column: r}"))
    result = CliRunner().invoke(command, [*arguments_for(folder), *more])
    assert result.exit_code == status
    assert (folder / "d").exists() is (status == 0)
    if status:
        assert "3 of 4 rows were left out (bad_label): labels are numbers from 0 to 1" in str(result.exception)


@pytest.mark.parametrize(("values", "refused"), [(["M", "F"] * 20, True), (["1", "F"] * 20, False)])
def test_text_is_no_dense_feature(tmp_path: Path, values: list[str], refused: bool) -> None:
    pq.write_table(pa.table({"u": list(range(40)), "i": [1] * 40, "g": values}), tmp_path / "log.parquet")
    dense = "features: [{name: g, kind: dense, source: context, bounds: [0, 1]}]\n"
    (tmp_path / "spec.yaml").write_text(SPEC + dense)
    result = CliRunner().invoke(command, arguments_for(tmp_path))
    assert (result.exit_code != 0) is refused
    if refused:
        assert "feature 'g' (column 'g'): expected numbers, found none among 40 values" in str(result.exception)


def test_ingest_does_not_load_torch() -> None:
    """Which takes a second or two, and ingest has no use for it."""
    code = "import sys, lazydp.components.ingest.ingest; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
