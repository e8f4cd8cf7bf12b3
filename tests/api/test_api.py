"""The stable surface: its names, their types, how long importing it takes, and that the steps are the commands."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import lazydp.api
from lazydp.components.shared.errors import InputError
from lazydp.pipelines.cli import cli
from support.tiny import TINY_CONFIG, TINY_SPEC, write_interactions

ROOT = Path(__file__).resolve().parents[2]
# Adding a name is a decision; removing or renaming one breaks those who use it, and needs a new major version.
NAMES = {
    "AccountedTrainer",
    "Bundle",
    "Client",
    "DenseOptimizer",
    "EmbeddingSgd",
    "Ledger",
    "NoiseKey",
    "PoissonSampler",
    "PrivacyParameters",
    "PrivateTrainer",
    "__version__",
    "calibrate_noise_multiplier",
    "epsilon",
    "evaluate",
    "export",
    "export_module",
    "fix",
    "ingest",
    "load_module_release",
    "make_private",
    "make_private_with_epsilon",
    "train",
}
STEPS = ("ingest", "train", "export", "evaluate")
# `--check` prints for a person and makes nothing; `lazydp train --workers` starts this very command once for each rank.
OF_THE_COMMAND_ALONE = {"ingest": {"check"}, "train": {"workers"}}


def test_the_names_are_these() -> None:
    assert set(lazydp.api.__all__) == NAMES  # type: ignore[attr-defined]
    assert set(dir(lazydp.api)) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_loads_and_is_documented(name: str) -> None:
    found = getattr(lazydp.api, name)
    assert found is getattr(lazydp.api, name)
    if name != "__version__":
        assert found.__name__ == name
        assert len(inspect.getdoc(found) or "") > 40


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Trainer'; it exports AccountedTrainer, Bundle"):
        lazydp.api.Trainer  # type: ignore[attr-defined]  # noqa: B018 - the access is the test


def test_the_stub_names_what_is_loaded() -> None:
    """Type checkers read the stub, Python the table: the same names from the same modules."""
    found = {}
    for node in ast.parse((ROOT / "api" / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name, "`as` makes a stub's name public"
                found[alias.name] = node.module
    assert found == lazydp.api._HOMES  # type: ignore[attr-defined]


def test_importing_it_loads_nothing() -> None:
    program = (
        "import sys; before = set(sys.modules); import lazydp.api; lazydp.api.__version__;"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lazydp']"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_the_options_of_its_command(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = {
        parameter.opts[0].removeprefix("--").replace("-", "_")
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name != "help"
    }
    parameters = inspect.signature(getattr(lazydp.api, name)).parameters
    assert set(parameters) == options - OF_THE_COMMAND_ALONE.get(name, set())
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_the_steps_make_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_interactions(tmp_path / "interactions.parquet")
    ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
    config: dict[str, Any] = {**TINY_CONFIG, "steps": 3}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))

    data = lazydp.api.ingest(input="interactions.parquet", spec=TINY_SPEC, out="dataset")
    assert data.manifest.counts.users == 60
    cli.main(
        [
            "budget",
            "set",
            "--dataset",
            "dataset",
            "--epsilon",
            "10",
            "--delta",
            "1e-5",
            "--privacy-unit",
            "example",
            "--ledger",
            ledger,
        ],
        standalone_mode=False,
    )
    run = lazydp.api.train(dataset="dataset", config="train.yaml", out="run", ledger=ledger)
    bundle = lazydp.api.export(
        run=run.folder, dataset="dataset", out="bundle", name="tiny", ledger=ledger, link="current"
    )
    figures = lazydp.api.evaluate(bundle="bundle", dataset="dataset", out="metrics.json")

    assert bundle.manifest.name == "tiny"
    assert bundle.statement.epsilon is not None
    assert (tmp_path / "current").resolve() == tmp_path / "bundle"
    assert figures.model is not None
    assert (tmp_path / "metrics.json").exists()
    with lazydp.api.Ledger.open(ledger, read_only=True) as opened:
        assert [release.release for release in opened.releases()] == [bundle.manifest.version]
    with pytest.raises(InputError, match="exists"):
        lazydp.api.ingest(input=[tmp_path / "interactions.parquet"], spec=TINY_SPEC, out=tmp_path / "dataset")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "x"}, "publish_to"),
        ({"tune": "sweep.yaml", "publish_to": "out"}, "sweep"),
        ({"config": {"steps": "many"}}, "config"),
    ],
)
def test_train_refuses_options_that_do_not_go_together(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"dataset": "dataset", "config": TINY_CONFIG, "out": "run", **arguments}
    with pytest.raises(InputError, match=message):
        lazydp.api.train(**given)
