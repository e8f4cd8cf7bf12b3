"""`lazydp ingest` and the component: thin shells around one function."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from lazydp.components.ingest.cli import command
from lazydp.components.ingest.dataset import EncodedDataset
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
    ingest.python_func(input_uri=str(folder / "log.parquet"), spec=SPEC, dataset=artifact)
    dataset = EncodedDataset.open(folder / "artifact")
    assert artifact.metadata == {"fingerprint": dataset.manifest.fingerprint}
    assert dataset.manifest.counts.train == 3
