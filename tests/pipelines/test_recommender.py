"""The pipeline: what is compiled for a cluster, and a whole run on this machine."""

import json
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import composed, counts_event, dpsgd_event
from lazydp.pipelines.cli import cli, main
from support import known_key
from support.kfp_backend import PodHost
from support.tiny import RUN_CONFIG


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, standalone_mode=True)


def test_a_package_must_be_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["pipeline", "compile", "--out", str(tmp_path / "pipeline.json")])
    assert exited.value.code == 1
    assert capsys.readouterr().err.strip() == "lazydp: the package must be named *.yaml, found pipeline.json"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "sample"
    result = invoke("sample-data", "--out", str(folder), "--users", "60", "--items", "400", "--interactions", "3000")
    assert result.exit_code == 0, result.output
    (folder / "train.yaml").write_text(RUN_CONFIG)
    # The accounting of a user of 64 examples takes a dozen seconds, in three processes.
    spec = folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("max_examples_per_user: 64", "max_examples_per_user: 4"))
    return folder


def run(sample: Path, out: Path, *options: str) -> list[str]:
    data = ["--input", str(sample / "interactions.parquet"), "--spec", str(sample / "spec.yaml")]
    return ["pipeline", "run", *data, "--config", str(sample / "train.yaml"), "--out", str(out), *options]


@pytest.fixture
def forked_tasks(pod_host: PodHost, tmp_path: Path) -> Iterator[None]:
    """kfp's runner starts the processes of tasks from a server that has the libraries imported."""
    (tmp_path / "pod").mkdir()
    pod_host.make_python(tmp_path / "pod" / "python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "pod" / "python3"))
        patch.setenv("KFP_BACKEND_POD", str(tmp_path / "pod"))
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield


def plain_version(sample: Path, out: Path) -> str:
    """Version of the bundle that the plain commands make, in this process."""
    ledger = ["--ledger", f"sqlite:///{out / 'ledger.db'}"]
    data = ["--input", str(sample / "interactions.parquet"), "--spec", str(sample / "spec.yaml")]
    dataset, bundle = ["--dataset", str(out / "dataset")], out / "bundle"
    for command in (
        ["ingest", *data, "--out", str(out / "dataset")],
        ["budget", "set", *dataset, "--epsilon", "1000", "--delta", "1e-5", "--privacy-unit", "example", *ledger],
        ["train", *dataset, "--config", str(sample / "train.yaml"), "--out", str(out / "run"), *ledger],
        ["export", "--run", str(out / "run"), *dataset, "--out", str(bundle), *ledger],
    ):
        result = invoke(*command)
        assert result.exit_code == 0, result.output
    return str(json.loads((bundle / "manifest.json").read_text())["version"])


@pytest.mark.parametrize("tasks", ["forks", pytest.param("programs", marks=pytest.mark.slow)])
def test_whole_run_then_a_run_over_budget(
    sample: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tasks: str,
) -> None:
    python = sys.executable
    if tasks == "forks":
        request.getfixturevalue("forked_tasks")
    monkeypatch.setenv("PYTHONPATH", str(Path(known_key.__file__).with_name("known_key_site")))
    monkeypatch.setenv(known_key.VARIABLE, "local")
    counts = counts_event(noise_multiplier=5.0)
    once, twice = (
        epsilon(
            composed([dpsgd_event(noise_multiplier=1.0, sampling_prob=0.02, steps=10 * runs), *[counts] * runs]),
            delta=1e-5,
        )
        for runs in (1, 2)
    )
    budget = f"{(once + twice) / 2:.4f}"  # room for one such run, not for two
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exited:
        main(run(sample, out, "--budget-epsilon", budget, "--compare", "--ask"))
    shown = capfd.readouterr()
    assert exited.value.code == 0, shown.err
    assert len(shown.out.splitlines()) <= 50, "one screen"
    # Warnings for whoever trains are shown; other log records stay in the log.
    assert all("[private]" in line for line in shown.out.splitlines() if "lazydp." in line)
    assert shown.out.count("{") == 0, "JSON stays in files"
    order = ["✓ ingest", "✓ evaluate", "model with privacy", "model without privacy", "popularity", "per person"]
    order += ["per example", "  budget  ", "Recommendations for user", "Next", "lazydp serve --bundle", "answers.json"]
    # Log records between the steps may hold these words as well.
    screen = "\n".join(line for line in shown.out.splitlines() if "lazydp." not in line)
    found = [screen.index(expected) for expected in order]
    assert found == sorted(found), shown.out
    titles = re.findall(r"^ +[1-5]  +(\w.*\w)  +\S+  +-?\d\.\d{4}", shown.out, flags=re.M)
    assert len(titles) == 5, shown.out
    answers = json.loads((out / "answers.json").read_text())
    assert [item["title"] for item in next(iter(answers.values()))["items"]] == titles
    assert answers["GET /v1/privacy/budget"]["source"] == "ledger"
    assert 'POST /v1/recommendations {"k": 5}' in answers, "what an unknown user gets"
    assert "INFO lazydp.train" in (out / "pipeline.log").read_text()

    statement = json.loads((out / "bundle" / "manifest.json").read_text())["privacy"]
    assert statement["private"]
    assert statement["epsilon"] == pytest.approx(once)
    assert statement["popularity"]["noise_multiplier"] == 5.0
    assert (out / "bundle" / "popularity.safetensors").exists()
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["model"]["hr_at_10"] <= 1
    assert stat.S_IMODE(out.stat().st_mode) == 0o700, "the folder holds the private dataset and checkpoints"

    # The same again, now by programs of their own: two such runs together are over the budget, the second never trains.
    sys.executable = python  # which the fixture, or nobody, restores
    with pytest.raises(SystemExit) as exited:
        main(run(sample, out))
    error = capfd.readouterr().err
    assert exited.value.code == 1
    assert f"does not admit the run: epsilon {float(budget):g}" in error
    assert "charged so far" in error
    assert len(error.strip().splitlines()) == 1
    runs = [path for path in (out / "runs").iterdir() if re.fullmatch(r"run-\d+", path.name)]
    assert len(runs) == 1, "the second run never began"

    # The plain commands under the same key end in the same bits. (Under two keys they do not: test_on_the_backend.)
    known_key.replace("local", monkeypatch)
    (tmp_path / "plain").mkdir()
    version = json.loads((out / "bundle" / "manifest.json").read_text())["version"]
    assert plain_version(sample, tmp_path / "plain") == version


def test_usage(tmp_path: Path) -> None:
    assert invoke("pipeline", "run", "--out", str(tmp_path)).exit_code == 2
    assert invoke("pipeline", "run", "--sample", "--spec", "x", "--out", str(tmp_path)).exit_code == 2
