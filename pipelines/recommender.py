"""The pipeline: ingest, budget gate, train, export, evaluate; and beside it, where asked, the run without privacy.

The noise key never passes through the artifact store: training and export meet in a folder of `runs_folder`, which on a
cluster is a volume that outlives their pods. A retry of a pod is the same run, since the pipeline's job id names it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kfp import dsl
from kfp import kubernetes as kfp_kubernetes
from kfp.dsl import Artifact, Metrics, Model

from lazydp.components.evaluate.component import evaluate
from lazydp.components.export.component import export
from lazydp.components.gate.component import budget_gate
from lazydp.components.ingest.component import ingest
from lazydp.components.train.component import train

LEDGER_VARIABLE = "LAZYDP_LEDGER"
SECRET_VARIABLE = "LAZYDP_LEDGER_SECRET"  # noqa: S105 - the name of a variable


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What the tasks need of a cluster; a local run ignores all of it.

    Attributes:
        runs_claim: persistent volume claim for run folders (ReadWriteMany, or ReadWriteOnce on one node).
        runs_mount: where it is mounted.
        ledger_secret: Kubernetes secret whose key `url` is the ledger's URL.
        cpu: CPUs that training asks for, as Kubernetes writes them.
        memory: memory that training asks for.
    """

    runs_claim: str
    runs_mount: str
    ledger_secret: str | None
    cpu: str
    memory: str


class Outputs(NamedTuple):
    """What the pipeline returns: the release, and its figures (private)."""

    bundle: Model
    metrics: Metrics
    report: Artifact


class ComparedOutputs(NamedTuple):
    """The same, and the figures of the model without privacy."""

    bundle: Model
    metrics: Metrics
    report: Artifact
    floor: Artifact


def recommender_pipeline(*, compare: bool = False, cluster: Cluster | None = None) -> Callable[..., Any]:
    """The pipeline.

    Args:
        compare: also train the same model without privacy, and measure it; its bundle is marked not private.
        cluster: volume, secret and resources, for a pipeline that is compiled for a cluster.
    """
    outputs = ComparedOutputs if compare else Outputs  # kfp reads the annotation, so it is chosen first

    @dsl.pipeline(  # type: ignore[untyped-decorator]
        name="lazydp-recommender",
        description="Parquet to a differentially private recommender, its bundle, and the privacy budget it spent.",
    )
    def recommender(
        input_uri: str,
        spec: str,
        config: str,
        runs_folder: str,
        ledger_url: str = "",
        users_uri: str = "",
        items_uri: str = "",
        budget_epsilon: float = 0.0,
        budget_delta: float = 0.0,
        operator: str = "",
        name: str = "",
        compare_config: str = "",
    ) -> outputs:  # type: ignore[valid-type]
        run_id = f"run-{dsl.PIPELINE_JOB_ID_PLACEHOLDER}"
        folder = f"{runs_folder}/{run_id}"
        encoded = ingest(input_uri=input_uri, spec=spec, users_uri=users_uri, items_uri=items_uri)
        data = encoded.outputs["dataset"]
        reserved = budget_gate(
            dataset=data,
            config=config,
            run_id=run_id,
            ledger_url=ledger_url,
            budget_epsilon=budget_epsilon,
            budget_delta=budget_delta,
            operator=operator,
        )
        trained = train(dataset=data, config=config, run_folder=folder, run_id=reserved.output, ledger_url=ledger_url)
        released = export(dataset=data, run_folder=folder, run_id=trained.output, ledger_url=ledger_url, name=name)
        measured = evaluate(bundle=released.outputs["bundle"], dataset=data)
        _place([reserved, trained, released], cluster)
        found = (released.outputs["bundle"], measured.outputs["metrics"], measured.outputs["report"])
        if compare:
            return ComparedOutputs(*found, _without_privacy(data, compare_config, folder, run_id, cluster))
        return Outputs(*found)

    return recommender  # type: ignore[no-any-return]


def _without_privacy(data: Any, config: Any, folder: str, run_id: str, cluster: Cluster | None) -> Any:
    """The report of the same model with neither clipping nor noise, for comparison."""
    floor = f"{run_id}-sgd"
    trained = train(dataset=data, config=config, run_folder=f"{folder}-sgd", run_id=floor, mode="sgd")
    trained.set_display_name("train-without-privacy")
    released = export(dataset=data, run_folder=f"{folder}-sgd", run_id=trained.output, allow_non_private=True)
    released.set_display_name("export-without-privacy")
    measured = evaluate(bundle=released.outputs["bundle"], dataset=data)
    measured.set_display_name("evaluate-without-privacy")
    _place([trained, released], cluster)
    return measured.outputs["report"]


def _place(tasks: list[dsl.PipelineTask], cluster: Cluster | None) -> None:
    """Volume, secret and resources; and no cache: a cached reservation or release would be one that never happened."""
    for task in tasks:
        task.set_caching_options(False)
        if cluster is None:
            continue
        kfp_kubernetes.mount_pvc(task, pvc_name=cluster.runs_claim, mount_path=cluster.runs_mount)
        if cluster.ledger_secret is not None:
            kfp_kubernetes.use_secret_as_env(
                task,
                secret_name=cluster.ledger_secret,
                secret_key_to_env={"url": LEDGER_VARIABLE, "secret": SECRET_VARIABLE},
            )
        task.set_cpu_request(cluster.cpu).set_memory_request(cluster.memory)
        task.set_retry(num_retries=2)
