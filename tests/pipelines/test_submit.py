"""`lazydp pipeline submit` against a server that checks each request."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazydp.components.shared.errors import InputError
from lazydp.pipelines.cli import main
from lazydp.pipelines.kubeflow import token_of
from support.kfp_api import ApiServer, strictly

CONFIG = "{model: {kind: two_tower, embedding_dim: 8}, steps: 1}"
NEEDED = ["--parameter", "input_uri=s3://log/", "--parameter", "spec={name: x}"]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as running:
        yield running


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYDP_KUBEFLOW_TOKEN", "good")


def submit(url: str, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    """Status, output and error of the command."""
    config = folder / "train.yaml"
    config.write_text(CONFIG)
    common = ["--host", url, "--namespace", "recs", "--config", str(config), "--poll", "0.01"]
    with pytest.raises(SystemExit) as exited:
        main(["pipeline", "submit", *common, *NEEDED, *options])
    shown = capsys.readouterr()
    assert isinstance(exited.value.code, int)
    return exited.value.code, shown.out, shown.err


def test_upload_run_and_wait(server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--wait", "--run-name", "by hand", "--parameter", "budget_epsilon=8", "--service-account", "runner"]
    status, out, err = submit(server.url, tmp_path, capsys, *options)
    assert (status, err) == (0, "")
    assert "train: running" in out
    assert "train: succeeded" in out
    assert f"{server.url}/#/runs/details/run-1" in out
    [run] = server.bodies("/apis/v2beta1/runs")
    assert run["experiment_id"] == "e-1"
    assert run["display_name"] == "by hand"
    assert run["service_account"] == "runner"
    assert run["pipeline_version_reference"] == {"pipeline_id": "p-1", "pipeline_version_id": "v-1"}
    given = run["runtime_config"]["parameters"]
    assert given.pop("operator")
    assert given == {"input_uri": "s3://log/", "spec": "{name: x}", "budget_epsilon": 8.0}
    assert server.bodies("/apis/v2beta1/pipelines/upload") == [
        {"name": "lazydp-train-and-release", "namespace": "recs"}
    ]


def test_another_version_and_the_same_again(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package of the same content is uploaded once: its version is named by its digest."""
    for options in ([], ["--cpu", "8"], ["--cpu", "8"]):
        assert submit(server.url, tmp_path, capsys, *options)[0] == 0
    versions = [run["pipeline_version_reference"]["pipeline_version_id"] for run in server.bodies("/apis/v2beta1/runs")]
    assert versions == ["v-1", "v-2", "v-2"]


def test_a_recurring_run(server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--schedule", "30 2 * * *", "--experiment", "nightly", "--create-experiment"]
    status, out, _ = submit(server.url, tmp_path, capsys, *options)
    assert status == 0
    assert "recurring run rec-1 (0 30 2 * * *)" in out
    [recurring] = server.bodies("/apis/v2beta1/recurringruns")
    assert recurring["trigger"] == {"cron_schedule": {"cron": "0 30 2 * * *"}}
    assert (recurring["mode"], recurring["max_concurrency"], recurring["no_catchup"]) == ("ENABLE", "1", True)
    assert recurring["experiment_id"] == "e-2"
    assert server.bodies("/apis/v2beta1/experiments") == [{"display_name": "nightly", "namespace": "recs"}]


def test_a_failed_run_says_what_its_task_said(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.outcome = "FAILED"
    server.log = "lazydp.train: step 1\nlazydp.components.shared.errors.BudgetExceededError: epsilon 1 is too little\n"
    status, _, err = submit(server.url, tmp_path, capsys, "--wait")
    assert status == 1
    assert err.startswith("lazydp: run run-1 failed: train: epsilon 1 is too little (http://")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--experiment", "unknown"], "has no experiment 'unknown' in namespace recs"),
        (["--schedule", "at night"], "expected a cron line"),
        (["--parameter", "budget_epsilonn=8"], "no such parameter; did you mean 'budget_epsilon'?"),
        (["--parameter", "budget_epsilon=eight"], "expected a number, found 'eight'"),
        (["--parameter", "name={{workflow.name}}"], "would be taken for a placeholder"),
        (["--token-file", "/nonexistent"], "the token /nonexistent cannot be read"),
        (["--memory", "16GB"], "expected memory as Kubernetes writes it"),
    ],
)
def test_one_line_for_each_mistake(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    status, _, err = submit(server.url, tmp_path, capsys, *options)
    assert status == 1
    assert expected in err
    assert len(err.splitlines()) == 1
    assert server.bodies("/apis/v2beta1/runs") == []


def test_a_wrong_token_and_a_dead_host(
    server: ApiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYDP_KUBEFLOW_TOKEN", "bad")
    status, _, err = submit(server.url, tmp_path, capsys)
    assert status == 1
    assert "does not accept the token (401 Unauthenticated: token is not valid)" in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
    status, _, more = submit(dead, tmp_path, capsys)
    assert status == 1
    assert f"Kubeflow at {dead} does not answer" in more
    assert [len(text.splitlines()) for text in (err, more)] == [1, 1]


def test_the_server_refuses_what_the_models_do_not_know() -> None:
    """The check behind the tests above can fail."""
    strictly("V2beta1Run", {"display_name": "x"})
    for wrong in ({"displayname": "x"}, {"runtime_config": {"parameter": {}}}):  # type: ignore[var-annotated]
        with pytest.raises(ValueError, match="not a V2beta1Run"):
            strictly("V2beta1Run", wrong)


def test_the_token_is_read_again_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    read = token_of(file=file, in_cluster=False, environment={})
    assert read is not None
    assert read() == "one"
    file.write_text("two")
    assert read() == "two"
    file.write_text("")
    with pytest.raises(InputError, match="is empty"):
        read()
    assert token_of(file=None, in_cluster=False, environment={}) is None
