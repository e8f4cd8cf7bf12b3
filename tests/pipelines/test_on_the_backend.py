"""The compiled package as a cluster runs it: the interpreter of `tests/support/kfp_backend` in place of Kubeflow."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle
from lazydp.components.export.export import export
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.train import train
from lazydp.components.tune.sweep import Sweep
from lazydp.components.tune.tune import tune
from lazydp.pipelines.package import documents_of
from support import known_key
from support.kfp_backend import BackendRun
from support.kfp_backend.pod_server import no_network
from support.model_registry import RegistryServer

SWEEP = {
    "distribution": "geometric",
    "mean_trials": 2,
    "metric": "auc",
    "score": {"kind": "held_out", "noise_multiplier": 5.0},
    "settings": {"embeddings.learning_rate": [0.1, 1.0, 2.0]},
}
TASKS = {"ingest", "budget-gate", "train", "export", "evaluate", "finish"}


def options(cluster: Any) -> tuple[str, ...]:
    return ("--spec", str(cluster.folder / "spec.yaml"), "--config", str(cluster.folder / "train.yaml"))


def succeeded(run: BackendRun) -> BackendRun:
    assert run.state == "SUCCEEDED", run.failed()
    return run


def statuses(cluster: Any) -> dict[str, str]:
    with Ledger.open(cluster.ledger, read_only=True) as ledger:
        return {run.run_id: run.status for run in ledger.runs()}


def test_twice_in_a_row(cluster: Any) -> None:
    package = cluster.compiled(*options(cluster))
    runs = [succeeded(cluster.run(package)) for _ in range(2)]
    names = [f"run-{run.run_id}" for run in runs]
    assert statuses(cluster) == dict.fromkeys(names, "committed")
    bundles = [run.tasks["export"].artifacts["bundle"] for run in runs]
    assert [bundle["metadata"]["run_id"] for bundle in bundles] == names
    assert bundles[0]["metadata"]["version"] != bundles[1]["metadata"]["version"]
    for run, bundle in zip(runs, bundles, strict=True):
        assert set(run.tasks) >= TASKS
        assert all(task.state == "SUCCEEDED" and task.attempts <= 1 for task in run.tasks.values())
        assert Bundle.open(cluster.backend.stored(bundle["uri"])).manifest.version == bundle["metadata"]["version"]
    with Ledger.open(cluster.ledger, read_only=True) as ledger:
        assert {run.reserved_by for run in ledger.runs()} == {"nightly"}
        assert {release.released_by for release in ledger.releases()} == {"nightly"}
    shown = {name for name, task in runs[0].tasks.items() if "page" in task.artifacts}
    assert shown == {"ingest", "budget-gate", "train", "export", "evaluate"}
    for name in shown:
        found = runs[0].tasks[name].artifacts["page"]
        assert found["type"]["schemaTitle"] == "system.HTML"
        assert cluster.backend.stored(found["uri"]).read_text().startswith("<!doctype html>")
    # What is private went with the runs: no checkpoint, no key, no second copy of the bundle.
    assert not any(cluster.backend.volume("lazydp-runs").rglob("*"))


def test_a_nightly_pair_shares_one_budget(cluster: Any, tiny_sample: Path) -> None:
    """The log of the next night is another dataset of the same people: `retrain` charges it to their budget."""
    nights = [str(tiny_sample / "interactions.parquet"), str(cluster.folder / "next.parquet")]
    log = pq.read_table(nights[0])
    pq.write_table(log.slice(20), nights[1])
    family = {"family": "sample"}
    first = succeeded(
        cluster.run(cluster.compiled(*options(cluster)), input_uri=nights[0], budget_epsilon=0.3, **family)
    )
    retrain = cluster.compiled("--pipeline", "retrain", *options(cluster))
    given = {name: value for name, value in cluster.parameters.items() if name != "budget_epsilon"}
    second = succeeded(cluster.backend.run(retrain, {**given, **family, "input_uri": nights[1]}))
    assert statuses(cluster) == {f"run-{run.run_id}": "committed" for run in (first, second)}
    with Ledger.open(cluster.ledger, read_only=True) as ledger:
        [budget] = ledger.budgets()
    assert (budget.committed_runs, budget.declared_family) == (2, "sample")
    assert budget.charged_epsilon > 0.25, "both nights count"
    # There is room for no third: it stops with the figures, before anything is trained.
    third = cluster.backend.run(retrain, {**given, **family, "input_uri": nights[0]})
    assert third.tasks["budget-gate"].state == "FAILED"
    assert third.tasks["train"].state == "SKIPPED"
    assert "does not admit the run: epsilon 0.3" in third.failed()
    # Nor does another family open a budget by this pipeline.
    other = cluster.backend.run(retrain, {**given, "family": "others", "input_uri": nights[1]})
    assert "is of family sample, and the pipeline is for family others" in other.failed()


def with_old_names(package: Path) -> Path:
    """The package as it was: the run's name made of a placeholder inside a longer text."""
    old = package.with_name("old.yaml")
    text = package.read_text()
    assert text.count("'{{$.pipeline_job_uuid}}'") == 2
    old.write_text(text.replace("'{{$.pipeline_job_uuid}}'", "'run-{{$.pipeline_job_uuid}}'"))
    return old


def partial_placeholders(package: Path) -> list[str]:
    """Constants of the IR that hold a placeholder and more."""
    spec = documents_of(package)[0]
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            text = node.get("runtimeValue", {}).get("constant", "") if "runtimeValue" in node else ""
            if (
                isinstance(text, str)
                and "{{$" in text
                and not (text.startswith("{{$") and text.find("}}") == len(text) - 2)
            ):
                found.append(text)
            for child in node.values():
                visit(child)
        elif isinstance(node, list):
            for child in node:
                visit(child)

    visit(spec["root"])
    visit(spec["components"])
    return found


def test_no_placeholder_inside_a_longer_text(cluster: Any) -> None:
    package = cluster.compiled(*options(cluster), "--compare")
    assert partial_placeholders(package) == []
    old = with_old_names(package)
    assert partial_placeholders(old) == ["run-{{$.pipeline_job_uuid}}"] * 2, "the check above can fail"
    run = cluster.run(old)
    assert run.state == "FAILED"
    assert run.tasks["budget-gate"].state == "FAILED"
    assert "found 'run-{{$.pipeline_job_uuid}}'" in run.failed()


def bundle_of(run: BackendRun) -> dict[str, Any]:
    """What the metadata store says of the release."""
    found: dict[str, Any] = run.tasks["export"].artifacts["bundle"]["metadata"]
    return found


def plain_version(cluster: Any, run: BackendRun, *, sweep: Sweep | None = None) -> str:
    """Version of the bundle of the plain functions, never disturbed, on the run's dataset under the key in use here."""
    given: dict[str, Any] = {
        "dataset": cluster.backend.stored(run.tasks["ingest"].artifacts["dataset"]["uri"]),
        "config": TrainConfig.load(cluster.folder / "train.yaml"),
        "ledger": f"sqlite:///{cluster.folder / 'plain.db'}",
    }
    with Ledger.open(given["ledger"]) as ledger:
        data = EncodedDataset.open(given["dataset"])
        register(ledger, fingerprint=data.manifest.fingerprint, name="sample")
        ledger.set_budget("sample", epsilon=1000.0, delta=1e-5, privacy_unit="example")
    out = cluster.folder / "plain"
    done = train(**given, out=out) if sweep is None else tune(**given, sweep=sweep, out=out)
    bundle = cluster.folder / "plain-bundle"
    return export(run=done.folder, dataset=given["dataset"], out=bundle, ledger=given["ledger"]).version


def test_killed_midway_and_retried(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod that dies is the same run again: the same bits as one that was never disturbed, charged once."""
    package = cluster.compiled(*options(cluster), cluster={"environment": {known_key.VARIABLE: "one"}})
    runs = cluster.backend.volume("lazydp-runs")

    def kill(task: str, attempt: int, _pod: Path) -> bool:
        return task == "train" and attempt == 1 and any(runs.glob("*/checkpoints/step-00000000[23]"))

    run = succeeded(cluster.run(package, kill=kill))
    assert run.tasks["train"].attempts == 2
    assert statuses(cluster) == {f"run-{run.run_id}": "committed"}
    with Ledger.open(cluster.ledger, read_only=True) as ledger:
        [budget] = ledger.budgets()
        assert len(ledger.releases()) == 1
    assert budget.committed_runs == 1
    assert budget.reserved_runs == 0
    known_key.replace("one", monkeypatch)
    assert bundle_of(run)["version"] == plain_version(cluster, run)


def test_a_sweep_killed_midway_is_one_run(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate, trials, one release, one charge; the same choice and the same bits as a sweep that nobody disturbed."""
    (cluster.folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    package = cluster.compiled(
        *("--pipeline", "sweep", "--sweep", str(cluster.folder / "sweep.yaml")),
        *options(cluster),
        cluster={"environment": {known_key.VARIABLE: "sweep 1"}},
    )
    runs = cluster.backend.volume("lazydp-runs")

    def kill(task: str, attempt: int, _pod: Path) -> bool:
        return task == "tune" and attempt == 1 and any(runs.glob("*/trial-00002/checkpoints/step-00000000[23]"))

    run = succeeded(cluster.run(package, budget_epsilon=100.0, kill=kill))
    assert run.tasks["tune"].attempts == 2
    name = f"run-{run.run_id}"
    assert run.tasks["tune"].parameters["Output"] == f"{name}/best"
    with Ledger.open(cluster.ledger, read_only=True) as ledger:
        assert [(found.run_id, found.purpose, found.status) for found in ledger.runs()] == [
            (name, "tuning", "committed")
        ]
        assert len(ledger.releases()) == 1
    statement = Bundle.open(cluster.backend.stored(run.tasks["export"].artifacts["bundle"]["uri"])).statement
    assert statement.tuning is not None
    assert statement.tuning.mean_trials == 2
    assert not any(runs.rglob("*")), "no trial and no key stays on the volume"
    known_key.replace("sweep 1", monkeypatch)
    assert bundle_of(run)["version"] == plain_version(cluster, run, sweep=Sweep.model_validate(SWEEP))


def test_a_pod_has_no_network_but_loopback() -> None:
    """The check behind every run above can fail."""
    for event, arguments in (
        ("socket.connect", (None, ("192.0.2.1", 443))),
        ("socket.getaddrinfo", ("registry.example", 443, 0, 0, 0)),
    ):
        with pytest.raises(OSError, match="no network in this pod"):
            no_network(event, arguments)
    no_network("socket.connect", (None, ("127.0.0.1", 443)))


def test_a_refused_budget_is_not_tried_again(cluster: Any) -> None:
    package = cluster.compiled(*options(cluster))
    run = cluster.run(package, budget_epsilon=0.001)
    assert run.state == "FAILED"
    assert {name: task.state for name, task in run.tasks.items() if name != "exit-handler-1"} == {
        "ingest": "SUCCEEDED",
        "budget-gate": "FAILED",
        "train": "SKIPPED",
        "export": "SKIPPED",
        "evaluate": "SKIPPED",
        "finish": "SUCCEEDED",
    }
    assert run.tasks["budget-gate"].attempts == 1
    assert "does not admit the run: epsilon 0.001" in run.failed()
    assert "reserved nothing" in run.tasks["finish"].parameters["Output"]
    assert statuses(cluster) == {}


def test_a_failed_run_is_kept_or_voided(cluster: Any) -> None:
    kill_all = lambda task, _attempt, _pod: task == "train"  # noqa: E731
    kept = cluster.run(cluster.compiled(*options(cluster)), kill=kill_all)
    assert kept.tasks["train"].attempts == 3
    assert kept.tasks["export"].state == "SKIPPED"
    assert "retry the run in Kubeflow" in kept.tasks["finish"].parameters["Output"]
    voided = cluster.run(cluster.compiled(*options(cluster), cluster={"on_failure": "void"}), kill=kill_all)
    assert "voided" in voided.tasks["finish"].parameters["Output"]
    assert statuses(cluster) == {f"run-{kept.run_id}": "reserved", f"run-{voided.run_id}": "voided"}


@pytest.mark.slow
def test_tasks_get_what_they_need_and_no_more(cluster: Any) -> None:
    package = cluster.compiled(
        *options(cluster),
        "--compare",
        cluster={"data": {"secret": "s3"}, "environment": {"LAZYDP_EXAMPLE": "yes"}},
    )
    cluster.backend.add_secret("s3", {"access_key": "A", "secret_key": "B"})
    run = succeeded(cluster.run(package))
    given = {name: set(task.environment) for name, task in run.tasks.items() if task.environment}
    ledger = {"LAZYDP_LEDGER", "LAZYDP_LEDGER_SECRET", "LAZYDP_EXAMPLE"}
    assert given == {
        "ingest": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "LAZYDP_EXAMPLE"},
        "budget-gate": ledger,
        "train": ledger,
        "export": ledger,
        "finish": ledger,
        "evaluate": {"LAZYDP_EXAMPLE"},
        "train-2": {"LAZYDP_EXAMPLE"},
        "export-without-privacy": {"LAZYDP_EXAMPLE"},
        "evaluate-without-privacy": {"LAZYDP_EXAMPLE"},
    }
    plain = run.tasks["export-without-privacy"].artifacts["bundle"]
    assert plain["type"]["schemaTitle"] == "system.Artifact"
    assert plain["metadata"]["name"] == "sample-without-privacy"
    assert plain["metadata"]["privacy"].startswith("not private")
    metrics = run.tasks["evaluate"].artifacts["metrics"]["metadata"]
    assert "model_auc" in metrics
    assert not [name for name in metrics if name.endswith("users")]


def test_without_the_ledgers_secret_nothing_starts(cluster: Any) -> None:
    """A task without its ledger would make one of its own, in which nothing was ever spent."""
    run = cluster.run(cluster.compiled(*options(cluster), cluster={"ledger": {"secret": "other"}}))
    assert run.tasks["budget-gate"].state == "FAILED"
    assert "secret, key or claim 'other' does not exist" in run.failed()
    assert not Path(cluster.ledger.removeprefix("sqlite:///")).exists()


@pytest.mark.slow
def test_a_url_with_new_content_is_read_again(cluster: Any, tiny_sample: Path) -> None:
    """Kubeflow compares the text of a URI, which is enough only where the operator says that its content stays."""
    log = cluster.folder / "log.parquet"
    log.write_bytes((tiny_sample / "interactions.parquet").read_bytes())
    given = {"input_uri": str(log), "budget_epsilon": 0.001}
    for immutable, expected in ((False, "SUCCEEDED"), (True, "CACHED")):
        package = cluster.compiled(*options(cluster), cluster={"input_is_immutable": immutable})
        cluster.run(package, **given)
        assert cluster.run(package, **given).tasks["ingest"].state == expected


@pytest.mark.slow
def test_a_volume_for_each_run_and_what_comes_after_export(cluster: Any) -> None:
    options_of_it = {
        "runs": {"size": "1Gi"},
        "check_release": True,
        "max_latency_ms": 60000,
        "deploy": {"name": "films", "namespace": "recs", "changes": {"spec": {"predictor": {"maxReplicas": 9}}}},
    }
    with RegistryServer() as registry:
        package = cluster.compiled(*options(cluster), cluster={**options_of_it, "registry": {"url": registry.url}})
        run = succeeded(cluster.run(package))
    assert run.tasks["validate"].artifacts["metrics"]["metadata"]["queries"] == 3
    [version], [artifact] = registry.entries["model_versions"], registry.entries["model_artifacts"]
    stored = run.tasks["export"].artifacts["bundle"]
    assert (version["name"], version["author"]) == (stored["metadata"]["version"], "nightly")
    assert (artifact["uri"], artifact["modelSourceId"]) == (stored["uri"], run.run_id)
    written = run.tasks["deploy"].artifacts["manifest"]["uri"]
    manifest = yaml.safe_load(cluster.backend.stored(written).read_text())
    assert manifest["spec"]["predictor"]["maxReplicas"] == 9
    assert stored["uri"].removeprefix("minio://") in json.dumps(manifest)
    assert statuses(cluster) == {f"run-{run.run_id}": "committed"}
    assert json.dumps(run.tasks["train"].inputs["runs_folder"])
