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

from lazydp.components.deploy.component import deploy
from lazydp.components.evaluate.component import evaluate, evaluate_without_privacy
from lazydp.components.export.component import export, export_without_privacy
from lazydp.components.finish.component import finish
from lazydp.components.gate.component import budget_gate
from lazydp.components.ingest.component import ingest
from lazydp.components.register.component import register
from lazydp.components.shared.errors import InputError
from lazydp.components.train.component import train
from lazydp.components.tune.component import tune
from lazydp.components.validate.component import validate
from lazydp.pipelines.cluster import Cluster
from lazydp.pipelines.package import one_line
from lazydp.pipelines.placement import place

NAME = "lazydp-train-and-release"
RETRAIN_NAME = "lazydp-retrain"
SWEEP_NAME = "lazydp-sweep"


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
    """The pipeline of a first model: its data may get its first budget.

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
        family: str = "",
        other_people: str = "",
        operator: str = "",
        name: str = "",
        compare_config: str = "",
    ) -> outputs:  # type: ignore[valid-type]
        budget = {"budget_epsilon": budget_epsilon, "budget_delta": budget_delta, "other_people": other_people}
        return _whole(  # type: ignore[no-any-return]
            cluster,
            compare_config if compare else None,
            data={"input_uri": input_uri, "spec": spec, "users_uri": users_uri, "items_uri": items_uri},
            gate={"family": family, **budget},
            config=config,
            name=name,
            shared={"runs_folder": runs_folder, "ledger_url": ledger_url, "operator": operator},
        )

    return recommender  # type: ignore[no-any-return]


def retrain_pipeline(*, compare: bool = False, cluster: Cluster | None = None) -> Callable[..., Any]:
    """The pipeline of the next model, on newer data of the same people.

    It opens no budget: where the family's budget does not admit the run, or the data is of another family, the gate
    stops it, with the figures, before anything is trained.

    Args:
        compare: as `recommender_pipeline`.
        cluster: as `recommender_pipeline`.
    """
    outputs = None if cluster is not None else ComparedOutputs if compare else Outputs

    @dsl.pipeline(  # type: ignore[untyped-decorator]
        name=RETRAIN_NAME,
        description="A model on newer data of a family that has a budget, if the budget admits it.",
        pipeline_config=workspace(cluster),
    )
    def retrain(
        input_uri: str,
        spec: str,
        config: str,
        runs_folder: str,
        family: str,
        ledger_url: str = "",
        users_uri: str = "",
        items_uri: str = "",
        operator: str = "",
        name: str = "",
        compare_config: str = "",
    ) -> outputs:  # type: ignore[valid-type]
        return _whole(  # type: ignore[no-any-return]
            cluster,
            compare_config if compare else None,
            data={"input_uri": input_uri, "spec": spec, "users_uri": users_uri, "items_uri": items_uri},
            gate={"family": family},
            config=config,
            name=name,
            shared={"runs_folder": runs_folder, "ledger_url": ledger_url, "operator": operator},
        )

    return retrain  # type: ignore[no-any-return]


def sweep_pipeline(*, compare: bool = False, cluster: Cluster | None = None) -> Callable[..., Any]:
    """The pipeline of a private sweep: settings tried as one mechanism, one release, one charge.

    Args:
        compare: must be false: the settings are the sweep's, and the model without privacy would be of others.
        cluster: as `recommender_pipeline`.

    Raises:
        InputError: a comparison is asked for.
    """
    if compare:
        raise InputError("--compare: a sweep chooses the settings itself; compare a run with what it chose")
    outputs = None if cluster is not None else Outputs

    @dsl.pipeline(  # type: ignore[untyped-decorator]
        name=SWEEP_NAME,
        description="Settings chosen by trials as one private mechanism, and the best model released.",
        pipeline_config=workspace(cluster),
    )
    def sweep_and_release(
        input_uri: str,
        spec: str,
        config: str,
        sweep: str,
        runs_folder: str,
        ledger_url: str = "",
        users_uri: str = "",
        items_uri: str = "",
        budget_epsilon: float = 0.0,
        budget_delta: float = 1e-5,
        family: str = "",
        other_people: str = "",
        operator: str = "",
        name: str = "",
    ) -> outputs:  # type: ignore[valid-type]
        budget = {"budget_epsilon": budget_epsilon, "budget_delta": budget_delta, "other_people": other_people}
        return _whole(  # type: ignore[no-any-return]
            cluster,
            None,
            data={"input_uri": input_uri, "spec": spec, "users_uri": users_uri, "items_uri": items_uri},
            gate={"family": family, "sweep": sweep, **budget},
            config=config,
            name=name,
            shared={"runs_folder": runs_folder, "ledger_url": ledger_url, "operator": operator},
        )

    return sweep_and_release  # type: ignore[no-any-return]


PIPELINES = {"train-and-release": recommender_pipeline, "retrain": retrain_pipeline, "sweep": sweep_pipeline}
"""The pipelines by the name that the command line gives them."""


def _whole(
    cluster: Cluster | None,
    compare_config: Any,
    *,
    data: dict[str, Any],
    gate: dict[str, Any],
    config: Any,
    name: Any,
    shared: dict[str, Any],
) -> Any:
    """The tasks of each pipeline: on this machine with outputs, on a cluster inside an exit handler."""
    shared = shared | {"runs_folder": run_volume(shared["runs_folder"], cluster)}

    def steps() -> tuple[Any, ...]:
        return _steps(cluster, compare_config, data=data, gate=gate, config=config, name=name, shared=shared)

    if cluster is None:
        return (Outputs if compare_config is None else ComparedOutputs)(*steps())
    last = finish(job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, on_failure=cluster.on_failure, **shared)
    place(last, "finish", cluster, needs=("runs", "ledger"))
    with dsl.ExitHandler(last, name="run"):
        steps()
    return None


def _steps(
    cluster: Cluster | None,
    compare_config: Any,
    *,
    data: dict[str, Any],
    gate: dict[str, Any],
    config: Any,
    name: Any,
    shared: dict[str, Any],
) -> tuple[Any, ...]:
    encoded = ingest(**data)
    place(encoded, "ingest", cluster, needs=("data",))
    dataset = encoded.outputs["dataset"]
    ledger = {"ledger_url": shared["ledger_url"], "operator": shared["operator"]}
    reserved = budget_gate(dataset=dataset, config=config, job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, **gate, **ledger)
    place(reserved, "budget-gate", cluster, needs=("ledger",))
    run_id = reserved.outputs["Output"]
    if "sweep" in gate:
        trained = tune(dataset=dataset, config=config, sweep=gate["sweep"], run_id=run_id, **shared)
        place(trained, "tune", cluster, needs=("runs", "ledger"))
    else:
        trained = train(dataset=dataset, config=config, run_id=run_id, **shared)
        place(trained, "train", cluster, needs=("runs", "ledger"))
    released = export(dataset=dataset, run_id=trained.outputs["Output"], name=name, **shared)
    place(released, "export", cluster, needs=("runs", "ledger"))
    if cluster is not None:
        _after_export(released.outputs["bundle"], cluster, operator=shared["operator"])
    measured = evaluate(bundle=released.outputs["bundle"], dataset=dataset)
    place(measured, "evaluate", cluster)
    report = measured.outputs["report"]
    found = (released.outputs["bundle"], measured.outputs["metrics"], report)
    if compare_config is None:
        return found
    return *found, _without_privacy(dataset, compare_config, shared["runs_folder"], run_id, name, report, cluster)


def _after_export(bundle: Any, cluster: Cluster, *, operator: Any) -> None:
    """Check the release, then enter it in the registry, then have it served, as far as the cluster's options say so."""
    before = []
    if cluster.check_release:
        checked = validate(bundle=bundle, max_latency_ms=cluster.max_latency_ms)
        place(checked, "validate", cluster)
        before.append(checked)
    if cluster.registry is not None:
        entered = register(
            bundle=bundle, url=cluster.registry.url, author=operator, job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER
        ).after(*before)
        place(entered, "register", cluster, needs=("registry",))
        before.append(entered)
    if cluster.deploy is not None:
        asked = cluster.deploy
        served = deploy(
            bundle=bundle,
            name=asked.name,
            namespace=asked.namespace,
            image=cluster.image,
            service_account=asked.service_account or "",
            changes=one_line(asked.changes) if asked.changes else "",
            apply=asked.apply,
        ).after(*before)
        place(served, "deploy", cluster)


def _without_privacy(
    dataset: Any, config: Any, runs_folder: Any, run_id: Any, name: Any, release: Any, cluster: Cluster | None
) -> Any:
    """The report of the same model with neither clipping nor noise, for comparison with that of the release."""
    trained = train(
        dataset=dataset,
        config=config,
        runs_folder=runs_folder,
        run_id=run_id,
        mode="sgd",
        variant="without-privacy",
    )
    trained.set_display_name("train-without-privacy")
    place(trained, "train", cluster, needs=("runs",))
    run = trained.outputs["Output"]
    written = export_without_privacy(dataset=dataset, runs_folder=runs_folder, run_id=run, name=name)
    place(written, "export", cluster, needs=("runs",))
    measured = evaluate_without_privacy(bundle=written.outputs["bundle"], dataset=dataset, release=release)
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
