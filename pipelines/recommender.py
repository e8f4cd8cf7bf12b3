"""The pipeline: ingest, budget gate, train, export, evaluate; and beside it, where asked, the run without privacy.

The noise key never passes through the artifact store: training and export meet in a folder of `runs_folder`, which on a
cluster is a volume that outlives their pods. A retry of a pod is the same run, since the pipeline's job id names it.

The job id is passed as a bare placeholder: Kubeflow's backend replaces one only where it is a whole parameter, while
its local runner replaces it inside other text too. Names and folders are made of it inside the components.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl import Artifact, Metrics, Model

from lazydp.components.evaluate.component import evaluate
from lazydp.components.export.component import export, export_without_privacy
from lazydp.components.finish.component import finish
from lazydp.components.gate.component import budget_gate
from lazydp.components.ingest.component import ingest
from lazydp.components.train.component import train
from lazydp.pipelines.cluster import Cluster
from lazydp.pipelines.placement import place

NAME = "lazydp-train-and-release"


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
        cluster: for a pipeline that is compiled for a cluster, which then ends in an exit handler and, as kfp allows no
            others, has no outputs but the artifacts of its tasks.
    """
    # kfp reads the annotation, so it is chosen first
    outputs = None if cluster is not None else ComparedOutputs if compare else Outputs

    @dsl.pipeline(  # type: ignore[untyped-decorator]
        name=NAME,
        description="Parquet to a differentially private recommender, its bundle, and the privacy budget it spent.",
        pipeline_config=workspace(cluster),
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
        budget_delta: float = 1e-5,
        operator: str = "",
        name: str = "",
        compare_config: str = "",
    ) -> outputs:  # type: ignore[valid-type]
        folder = run_volume(runs_folder, cluster)

        def steps() -> tuple[Any, ...]:
            encoded = ingest(input_uri=input_uri, spec=spec, users_uri=users_uri, items_uri=items_uri)
            place(encoded, "ingest", cluster, needs=("data",))
            data = encoded.outputs["dataset"]
            reserved = budget_gate(
                dataset=data,
                config=config,
                job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
                ledger_url=ledger_url,
                budget_epsilon=budget_epsilon,
                budget_delta=budget_delta,
                operator=operator,
            )
            place(reserved, "budget-gate", cluster, needs=("ledger",))
            run_id = reserved.outputs["Output"]
            common = {"dataset": data, "runs_folder": folder, "ledger_url": ledger_url, "operator": operator}
            trained = train(config=config, run_id=run_id, **common)
            place(trained, "train", cluster, needs=("runs", "ledger"))
            released = export(run_id=trained.outputs["Output"], name=name, **common)
            place(released, "export", cluster, needs=("runs", "ledger"))
            measured = evaluate(bundle=released.outputs["bundle"], dataset=data)
            place(measured, "evaluate", cluster)
            found = (released.outputs["bundle"], measured.outputs["metrics"], measured.outputs["report"])
            if not compare:
                return found
            return *found, _without_privacy(data, compare_config, folder, run_id, name, cluster)

        if cluster is None:
            return (ComparedOutputs if compare else Outputs)(*steps())
        last = finish(
            job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
            runs_folder=folder,
            ledger_url=ledger_url,
            on_failure=cluster.on_failure,
            operator=operator,
        )
        place(last, "finish", cluster, needs=("runs", "ledger"))
        with dsl.ExitHandler(last, name="run"):
            steps()
        return None

    return recommender  # type: ignore[no-any-return]


def _without_privacy(data: Any, config: Any, folder: Any, run_id: Any, name: Any, cluster: Cluster | None) -> Any:
    """The report of the same model with neither clipping nor noise, for comparison."""
    trained = train(
        dataset=data, config=config, runs_folder=folder, run_id=run_id, mode="sgd", variant="without-privacy"
    )
    trained.set_display_name("train-without-privacy")
    place(trained, "train", cluster, needs=("runs",))
    written = export_without_privacy(dataset=data, runs_folder=folder, run_id=trained.outputs["Output"], name=name)
    place(written, "export", cluster, needs=("runs",))
    measured = evaluate(bundle=written.outputs["bundle"], dataset=data)
    measured.set_display_name("evaluate-without-privacy")
    place(measured, "evaluate", cluster)
    return measured.outputs["report"]


def workspace(cluster: Cluster | None) -> dsl.PipelineConfig | None:
    """The volume that Kubeflow makes for each run, where the cluster's options ask for one."""
    if cluster is None or cluster.runs.size is None:
        return None
    patch: dict[str, Any] = {"accessModes": [cluster.runs.access_mode]}
    if cluster.runs.storage_class is not None:
        patch["storageClassName"] = cluster.runs.storage_class
    return dsl.PipelineConfig(
        workspace=dsl.WorkspaceConfig(
            size=cluster.runs.size, kubernetes=dsl.KubernetesWorkspaceConfig(pvcSpecPatch=patch)
        )
    )


def run_volume(runs_folder: Any, cluster: Cluster | None) -> Any:
    """The folder of runs as tasks are given it: the parameter, or the run's own volume."""
    return runs_folder if cluster is None or cluster.runs.size is None else dsl.WORKSPACE_PATH_PLACEHOLDER
