"""Places the tasks of a pipeline on a cluster: image, resources, secrets, volumes, retries, as `cluster.yaml` says."""

from __future__ import annotations

from typing import Literal

from kfp import dsl
from kfp import kubernetes as kfp_kubernetes

from lazydp.components.shared.pipeline_run import LEDGER_VARIABLE
from lazydp.pipelines.cluster import Cluster, TaskOptions

SECRET_VARIABLE = "LAZYDP_LEDGER_SECRET"  # noqa: S105 - the name of a variable
TOKEN_VARIABLE = "LAZYDP_REGISTRY_TOKEN"  # noqa: S105 - the name of a variable
Need = Literal["runs", "ledger", "data", "registry"]


def place(task: dsl.PipelineTask, name: str, cluster: Cluster | None, *, needs: tuple[Need, ...] = ()) -> None:
    """Give a task its options; and no cache, unless its input never changes.

    Kubeflow caches by names and parameters. A cached reservation or release would be one that never happened, and a
    cached dataset yesterday's log.

    Args:
        task: of the pipeline.
        name: of the task in cluster.yaml.
        cluster: None for a pipeline that runs on this machine, where none of it has an effect.
        needs: what else the task is given: the volume of runs, the secret of ledger, data or registry.
    """
    task.set_caching_options(cluster is not None and cluster.input_is_immutable and name == "ingest")
    if cluster is None:
        return
    task.set_container_image(cluster.image)
    if cluster.image_pull_secret is not None:
        kfp_kubernetes.set_image_pull_secrets(task, [cluster.image_pull_secret])
    if cluster.image_pull_policy is not None:
        kfp_kubernetes.set_image_pull_policy(task, cluster.image_pull_policy)
    if "runs" in needs and cluster.runs.size is None:
        kfp_kubernetes.mount_pvc(task, pvc_name=cluster.runs.claim, mount_path=cluster.runs.mount)
    if "ledger" in needs:
        keys = {cluster.ledger.url_key: LEDGER_VARIABLE, cluster.ledger.secret_key: SECRET_VARIABLE}
        kfp_kubernetes.use_secret_as_env(task, secret_name=cluster.ledger.secret, secret_key_to_env=keys)
    if "data" in needs and cluster.data is not None:
        keys = {key: variable for variable, key in cluster.data.variables.items()}
        kfp_kubernetes.use_secret_as_env(task, secret_name=cluster.data.secret, secret_key_to_env=keys)
    if "registry" in needs and cluster.registry is not None and cluster.registry.secret is not None:
        keys = {cluster.registry.token_key: TOKEN_VARIABLE}
        kfp_kubernetes.use_secret_as_env(task, secret_name=cluster.registry.secret, secret_key_to_env=keys)
    _ask(task, cluster.options(name))
    for variable, value in {**cluster.environment, **(cluster.options(name).environment or {})}.items():
        task.set_env_variable(variable, value)
    for label, value in {**cluster.labels, **(cluster.options(name).labels or {})}.items():
        kfp_kubernetes.add_pod_label(task, label, value)
    if name != "budget-gate":
        _retry(task, cluster.options(name))


def _ask(task: dsl.PipelineTask, options: TaskOptions) -> None:
    task.set_cpu_request(options.cpu).set_cpu_limit(options.cpu_limit)
    task.set_memory_request(options.memory).set_memory_limit(options.memory_limit)
    if options.accelerator is not None:
        task.set_accelerator_type(options.accelerator.type).set_accelerator_limit(options.accelerator.count)
    if options.shared_memory is not None:
        kfp_kubernetes.empty_dir_mount(
            task,
            volume_name="dshm",
            mount_path="/dev/shm",  # noqa: S108 - a mount, not a file of ours
            medium="Memory",
            size_limit=options.shared_memory,
        )
    for label, value in (options.node_selector or {}).items():
        kfp_kubernetes.add_node_selector(task, label, value)
    for toleration in options.tolerations or ():
        kfp_kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect,
            toleration_seconds=toleration.seconds,
        )
    if options.timeout_s is not None:
        kfp_kubernetes.set_timeout(task, options.timeout_s)


def _retry(task: dsl.PipelineTask, options: TaskOptions) -> None:
    """Start failed pods again; never the gate's, for a refused budget stays refused."""
    retries = options.retries
    assert retries is not None
    if retries.count:
        task.set_retry(
            num_retries=retries.count,
            backoff_duration=f"{retries.backoff_s}s",
            backoff_factor=retries.factor,
            backoff_max_duration=f"{retries.max_s}s",
        )
