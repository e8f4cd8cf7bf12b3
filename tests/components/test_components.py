"""Each Kubeflow component called as Kubeflow would: what goes in, what comes out, what a retry does."""

import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle
from lazydp.components.deploy.component import deploy
from lazydp.components.evaluate.component import evaluate
from lazydp.components.export.component import export, export_without_privacy
from lazydp.components.finish.component import finish
from lazydp.components.gate.component import budget_gate
from lazydp.components.ingest.component import ingest
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.register.component import register
from lazydp.components.sample import sample as sample_module
from lazydp.components.sample.component import sample_data
from lazydp.components.sample.sample import SampleSize
from lazydp.components.shared.errors import InputError, NotPrivateError, PrivacyError
from lazydp.components.shared.pipeline_run import run_folder
from lazydp.components.train.component import train
from lazydp.components.tune.component import tune

CONFIG = """
model: {kind: two_tower, embedding_dim: 8}
privacy_unit: example
sampling_prob: 0.05
expected_batch_size: 30
steps: 4
noise_multiplier: 4.0
target_delta: 1.0e-5
"""


@pytest.fixture(autouse=True, scope="module")
def logging_as_it_was() -> Iterator[None]:
    """A component sends the log to its pod's standard output, for good; the tests after these want it back."""
    logger = logging.getLogger("lazydp")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


class Cluster:
    """Paths as a pod sees them, and the artifacts that the components fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = f"sqlite:///{folder / 'ledger.db'}"
        self.sample = dsl.Dataset(uri=str(folder / "sample"))
        self.dataset = dsl.Dataset(uri=str(folder / "dataset"))

    def artifact(self, kind: type[dsl.Artifact], name: str) -> Any:
        return kind(uri=str(self.folder / name))

    def page(self, task: str) -> Any:
        return self.artifact(dsl.HTML, f"{task}-page")

    def gate(self, job_id: str, **more: Any) -> str:
        found: str = budget_gate.python_func(
            dataset=self.dataset,
            config=CONFIG,
            job_id=job_id,
            page=self.page("gate"),
            **{"ledger_url": self.ledger, **more},
        )
        return found

    def train(self, run_id: str, **more: Any) -> str:
        found: str = train.python_func(
            dataset=self.dataset,
            config=CONFIG,
            runs_folder=str(self.folder),
            run_id=run_id,
            page=self.page("train"),
            **{"ledger_url": self.ledger, **more},
        )
        return found

    def export(self, run_id: str, bundle: Any, **more: Any) -> None:
        export.python_func(
            dataset=self.dataset,
            runs_folder=str(self.folder),
            run_id=run_id,
            bundle=bundle,
            page=self.page("export"),
            metrics=self.artifact(dsl.Metrics, "spent"),
            **{"ledger_url": self.ledger, **more},
        )

    def status(self) -> dict[str, str]:
        with Ledger.open(self.ledger, read_only=True) as ledger:
            return {run.run_id: run.status for run in ledger.runs()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A cluster with a sample that was ingested, by the components."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    with pytest.MonkeyPatch.context() as patch:
        make = sample_module.make_sample
        patch.setattr(
            sample_module,
            "make_sample",
            lambda *given, **more: make(*given, **more, size=SampleSize(users=80, items=40, interactions=700)),
        )
        sample_data.python_func(sample=made.sample, seed=3)
    folder = Path(made.sample.path)
    ingest.python_func(
        input_uri=str(folder / "interactions.parquet"),
        spec=str(folder / "spec.yaml"),
        dataset=made.dataset,
        page=made.page("ingest"),
    )
    return made


def test_ingest_tells_the_cluster_nothing_of_the_data(cluster: Cluster) -> None:
    data = EncodedDataset.open(cluster.dataset.path)
    assert cluster.dataset.metadata == {}
    assert len(data.split("train")) > 0


def test_ingest_takes_its_spec_as_text_and_several_inputs(cluster: Cluster) -> None:
    folder = Path(cluster.sample.path)
    again = cluster.artifact(dsl.Dataset, "again")
    interactions = str(folder / "interactions.parquet")
    ingest.python_func(
        input_uri=interactions,
        spec=(folder / "spec.yaml").read_text(),
        dataset=again,
        page=cluster.page("again"),
        users_uri=str(folder / "users.parquet"),
        items_uri=str(folder / "items.parquet"),
    )
    assert again.metadata == cluster.dataset.metadata
    with pytest.raises(InputError):
        ingest.python_func(
            input_uri=json.dumps([interactions, str(folder / "none.parquet")]),
            spec=str(folder / "spec.yaml"),
            dataset=again,
            page=cluster.page("again"),
        )


def test_from_the_gate_to_the_metrics(cluster: Cluster) -> None:
    with pytest.raises(PrivacyError, match="no budget"):
        cluster.gate("one")
    one = cluster.gate("one", budget_epsilon=20.0)
    assert one == "run-one"
    assert cluster.status() == {one: "reserved"}
    assert cluster.train(one) == cluster.train(one) == one  # a retry does nothing more
    assert stat.S_IMODE((cluster.folder / one).stat().st_mode) == 0o700

    bundle = cluster.artifact(dsl.Model, "bundle")
    cluster.export(one, bundle, name="films")
    released = Bundle.open(Path(bundle.path))
    assert bundle.metadata == {
        "name": "films",
        "version": released.manifest.version,
        "privacy": released.statement.line(),
        "run_id": one,
        "ledger_dataset": released.manifest.lineage.dataset,
        "ledger_head": released.manifest.lineage.ledger_head,
        "code_version": released.manifest.lineage.code_version,
        "config": released.manifest.lineage.config,
    }
    assert cluster.status() == {one: "committed"}
    assert not list((cluster.folder / one).rglob("noise.key"))
    # The pod died before the artifact was stored: the retry gives the same bundle, and charges nothing.
    again = cluster.artifact(dsl.Model, "bundle-again")
    cluster.export(one, again, name="films")
    assert again.metadata == bundle.metadata

    metrics, report = cluster.artifact(dsl.Metrics, "metrics"), cluster.artifact(dsl.Artifact, "report.json")
    evaluate.python_func(
        bundle=bundle, dataset=cluster.dataset, metrics=metrics, report=report, page=cluster.page("evaluate")
    )
    document = json.loads(Path(report.path).read_text())
    assert document["bundle"] == released.manifest.version
    assert metrics.metadata["model_auc"] == document["model"]["auc"]
    assert all(isinstance(value, float) for value in metrics.metadata.values())
    assert not [name for name in metrics.metadata if name.endswith("users")], "an exact count of people"
    assert stat.S_IMODE(Path(report.path).stat().st_mode) == 0o600


def test_a_run_without_privacy_passes_no_gate_and_is_marked(cluster: Cluster) -> None:
    plain = cluster.gate("plain", mode="sgd", ledger_url="")
    assert plain == "run-plain"
    assert cluster.train(plain, mode="sgd", variant="without-privacy", ledger_url="") == "run-plain-without-privacy"
    with pytest.raises(NotPrivateError, match="--allow-non-private"):
        cluster.export("run-plain-without-privacy", cluster.artifact(dsl.Model, "plain-bundle"))
    written = cluster.artifact(dsl.Artifact, "plain-artifact")
    export_without_privacy.python_func(
        dataset=cluster.dataset, runs_folder=str(cluster.folder), run_id="run-plain-without-privacy", bundle=written
    )
    assert written.metadata["privacy"].startswith("not private")
    assert written.metadata["name"] == "sample-without-privacy"


def test_who_started_the_pipeline_stands_in_every_entry(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYDP_OPERATOR", "")  # put back afterwards: a component sets it for its own process
    named = cluster.gate("named", operator="ada")
    cluster.train(named, operator="ada")
    cluster.export(named, cluster.artifact(dsl.Model, "named-bundle"), operator="ada")
    with Ledger.open(cluster.ledger, read_only=True) as ledger:
        [entry] = [release for release in ledger.releases() if release.run_id == named]
        assert entry.released_by == ledger.state().runs[named].reserved_by == "ada"


def test_no_ledger_is_made_for_want_of_one(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's default would be a fresh file in which nothing was ever spent, gone with the pod."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAZYDP_LEDGER", raising=False)
    for step in (lambda: cluster.gate("x", ledger_url=""), lambda: cluster.train("run-x", ledger_url="")):
        with pytest.raises(InputError, match=r"a pipeline needs a ledger.*LAZYDP_LEDGER.*ledger\.secret"):
            step()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(InputError, match=r"SQLite file in a pod.*PostgreSQL"):
        cluster.gate("x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job_id", ["{{$.pipeline_job_uuid}}", "run-{{$.pipeline_job_uuid}}", "", "a/b", "../x"])
def test_a_run_is_named_by_an_id_and_nothing_else(cluster: Cluster, job_id: str) -> None:
    with pytest.raises(InputError, match="PIPELINE_JOB_ID_PLACEHOLDER as the whole parameter"):
        cluster.gate(job_id)


def test_a_folder_of_runs_that_cannot_be_written_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match=r"not writable for uid.*deploy/volume/prepare\.yaml"):
        run_folder(str(tmp_path), "run-x")
    with pytest.raises(InputError, match="expected an absolute path"):
        run_folder("runs", "run-x")


def test_training_without_a_reservation_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster(tmp_path)
    other.dataset = cluster.dataset
    with pytest.raises(PrivacyError, match="no budget"):
        other.train("two")
    assert not list(tmp_path.rglob("state.safetensors"))


@pytest.mark.parametrize(
    "component",
    [sample_data, ingest, budget_gate, train, tune, export, export_without_privacy, evaluate, register, deploy, finish],
)
def test_a_component_is_a_thin_shell(component: Any) -> None:
    """It runs in the image that holds this package, and installs nothing."""
    container = component.component_spec.implementation.container
    assert "pip install" not in " ".join(container.command)
    assert container.image.startswith("lazydp")
