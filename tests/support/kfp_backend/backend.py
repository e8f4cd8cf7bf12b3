"""Runs a compiled package as the cluster would: DAGs, tasks, retries, caching, secrets, volumes, exit handlers."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from lazydp.pipelines.package import documents_of
from support.kfp_backend.cache import fingerprint
from support.kfp_backend.pods import PodHost
from support.kfp_backend.resolve import DriverError, Job, after_argo, checked, constant, protojson, replaced

_ROOT = "minio://mlpipeline/v2/artifacts"
WORKSPACE = "{{$.workspace_path}}"
_CREATED = "2026-01-01T00:00:00Z"
_QUOTA = ("resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit")

Kill = Callable[[str, int, Path], bool]
"""Asked with task, attempt (from 1) and the pod's folder whether to kill the pod now."""


@dataclass
class TaskRun:
    """What became of a task.

    Attributes:
        state: SUCCEEDED, FAILED, SKIPPED or CACHED.
        attempts: pods started.
        parameters: output parameters by name.
        artifacts: output artifacts by name, as the metadata store has them (uri, metadata, type, name).
        log: of the last pod.
        environment: that the last pod was given.
    """

    state: str
    attempts: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether tasks after it may start."""
        return self.state in {"SUCCEEDED", "CACHED"}


@dataclass
class BackendRun:
    """A run and its tasks, by name (those of a sub-DAG under their own names too)."""

    run_id: str
    tasks: dict[str, TaskRun]
    state: str = "RUNNING"

    def failed(self) -> str:
        """Name and log of the first task that failed itself."""
        name = next(name for name, task in self.tasks.items() if task.state == "FAILED" and task.log)
        return f"{name}: {self.tasks[name].log}"


class Backend:
    """A cluster with one namespace.

    Args:
        folder: for its object store, volumes and pods.
        host: starts processes.
        claims: persistent volume claims that exist.
        secrets: name -> key -> value.
    """

    def __init__(
        self, folder: Path, host: PodHost, *, claims: tuple[str, ...], secrets: Mapping[str, Mapping[str, str]]
    ) -> None:
        self._folder = folder
        self._host = host
        self._secrets = secrets
        self._volumes = {claim: folder / "volumes" / claim for claim in claims}
        for volume in self._volumes.values():
            volume.mkdir(parents=True)
        self._cache: dict[str, TaskRun] = {}
        self.workspace = folder / "kfp-workspace"

    def add_secret(self, name: str, content: Mapping[str, str]) -> None:
        """Make a secret."""
        self._secrets = {**self._secrets, name: content}

    def volume(self, claim: str) -> Path:
        """The content of a claim."""
        return self._volumes[claim]

    def stored(self, uri: str) -> Path:
        """What the object store has under a URI."""
        return self._folder / "store" / uri.removeprefix("minio://")

    def run(self, package: Path, parameters: Mapping[str, Any], *, kill: Kill | None = None) -> BackendRun:
        """Run the package once, to its end."""
        spec, platform = _parsed(package)
        job = Job(str(uuid.uuid4()), f"run-of-{package.stem}", f"{package.stem} by hand", _CREATED)
        run = BackendRun(job.run_id, {})
        if platform.get("pipelineConfig", {}).get("workspace"):
            (self._folder / "workspaces" / job.run_id).mkdir(parents=True)
        scope = _Scope(self, spec, platform, job, run, kill)
        root = spec["root"]
        declared = root.get("inputDefinitions", {}).get("parameters", {})
        if unknown := set(parameters) - set(declared):
            raise DriverError(f"unknown pipeline parameters {sorted(unknown)}")
        values = {name: definition.get("defaultValue") for name, definition in declared.items()} | dict(parameters)
        if missing := [name for name, value in values.items() if value is None]:
            raise DriverError(f"pipeline parameters without a value: {missing}")
        given = {name: protojson(checked(name, declared[name], value)) for name, value in values.items()}
        done = scope.dag(root["dag"], given, {})
        run.state = "SUCCEEDED" if done else "FAILED"
        return run


def _parsed(package: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Specification and platform configuration, each known to the last field by the backend's own messages."""
    documents = documents_of(package)
    spec = documents[0]
    platform = documents[1]["platforms"]["kubernetes"] if len(documents) > 1 else {}
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    for executor in spec["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, pipeline_spec_pb2.PipelineDeploymentConfig.ExecutorSpec())
    for config in _executors(platform).values():
        json_format.ParseDict(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    return spec, platform


def _executors(platform: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = platform.get("deploymentSpec", {}).get("executors", {})
    return found


@dataclass(frozen=True)
class _Around:
    """What a task of a DAG can refer to: the DAG's own inputs, and the tasks before it by name."""

    parameters: Mapping[str, Any]
    artifacts: Mapping[str, Any]
    done: Mapping[str, TaskRun]


@dataclass
class _Scope:
    backend: Backend
    spec: dict[str, Any]
    platform: dict[str, Any]
    job: Job
    run: BackendRun
    kill: Kill | None

    def dag(self, dag: Mapping[str, Any], parameters: Mapping[str, Any], artifacts: Mapping[str, Any]) -> bool:
        """Run the tasks of a DAG; returns whether all that are not exit handlers succeeded."""
        done: dict[str, TaskRun] = {}
        for name, task in _ordered(dag["tasks"]):
            last = task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
            if not last and not all(done[before].done for before in task.get("dependentTasks", [])):
                done[name] = TaskRun("SKIPPED")
            else:
                done[name] = self._task(name, task, _Around(parameters, artifacts, done))
            self.run.tasks.setdefault(name, done[name])
        return all(task.done for task in done.values())

    def _task(self, name: str, task: Mapping[str, Any], around: _Around) -> TaskRun:
        component = self.spec["components"][task["componentRef"]["name"]]
        if "condition" in task.get("triggerPolicy", {}):
            raise NotImplementedError("conditions")
        try:
            values = self._values(name, task, component, around)
            given = _artifacts(task, around.artifacts, around.done)
        except DriverError as error:
            return TaskRun("FAILED", log=f"driver: {error}")
        if "dag" in component:
            return TaskRun("SUCCEEDED" if self.dag(component["dag"], values, given) else "FAILED")
        label = component["executorLabel"]
        container = self.spec["deploymentSpec"]["executors"][label]["container"]
        return self._container(
            name, task, component, container, _executors(self.platform).get(label, {}), values, given
        )

    def _values(
        self, name: str, task: Mapping[str, Any], component: Mapping[str, Any], around: _Around
    ) -> dict[str, Any]:
        declared = component.get("inputDefinitions", {}).get("parameters", {})
        written = task.get("inputs", {}).get("parameters", {})

        def value_of(source: Mapping[str, Any]) -> Any:
            if "componentInputParameter" in source:
                return around.parameters.get(source["componentInputParameter"])
            if "taskOutputParameter" in source:
                producer = source["taskOutputParameter"]
                return around.done[producer["producerTask"]].parameters[producer["outputParameterKey"]]
            if "taskFinalStatus" in source:
                producer = source["taskFinalStatus"]["producerTask"]
                state = around.done[producer].state
                message = "" if around.done[producer].done else "a task failed"
                return {"state": state, "pipelineTaskName": producer, "error": {"message": message}}
            text = source["runtimeValue"]["constant"]
            if isinstance(text, str) and WORKSPACE in text:
                return text.replace(WORKSPACE, str(self.backend.workspace))
            channels = {key: value_of(other) for key, other in written.items() if key.startswith("pipelinechannel--")}
            return constant(source["runtimeValue"]["constant"], name, self.job, channels)

        found = {key: value_of(source) for key, source in written.items()}
        for key, definition in declared.items():
            if found.get(key) is None:
                found.pop(key, None)
                if "defaultValue" in definition:
                    found[key] = definition["defaultValue"]
        return {
            key: protojson(checked(key, declared[key], value) if key in declared else value)
            for key, value in found.items()
        }

    def _container(
        self,
        name: str,
        task: Mapping[str, Any],
        component: Mapping[str, Any],
        container: Mapping[str, Any],
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> TaskRun:
        missing = [field for field in _QUOTA if not container.get("resources", {}).get(field)]
        if missing:
            return TaskRun("FAILED", log=f"pods is forbidden: failed quota: must specify {', '.join(missing)}")
        try:
            environment = self._environment(container, config)
            mounts = {m["mountPath"]: self.backend._volumes[m["constant"]] for m in config.get("pvcMount", [])}
            if str(self.backend.workspace) in map(str, values.values()):
                mounts[str(self.backend.workspace)] = self.backend._folder / "workspaces" / self.run.run_id
        except KeyError as error:
            return TaskRun("FAILED", log=f"the pod never starts: secret, key or claim {error} does not exist")
        outputs = self._outputs(name, component)
        executor_input = {"inputs": {"parameterValues": values, "artifacts": given}, "outputs": outputs}
        cached = task.get("cachingOptions", {}).get("enableCache", False)
        key = fingerprint(executor_input, container, [m["constant"] for m in config.get("pvcMount", [])])
        if cached and key in self.backend._cache:
            earlier = self.backend._cache[key]
            return TaskRun("CACHED", parameters=earlier.parameters, artifacts=earlier.artifacts)
        found = TaskRun("FAILED", environment=environment, inputs=dict(values))
        for attempt in range(1, 2 + int(task.get("retryPolicy", {}).get("maxRetryCount", 0))):
            found.attempts = attempt
            pod = self.backend._folder / "pods" / f"{self.run.run_id[:8]}-{name}-{attempt}"
            if self._attempt(name, attempt, pod, container, executor_input, environment, mounts, found):
                found.state = "SUCCEEDED"
                self.backend._cache[key] = found
                break
        return found

    def _attempt(
        self,
        name: str,
        attempt: int,
        pod: Path,
        container: Mapping[str, Any],
        executor_input: Mapping[str, Any],
        environment: Mapping[str, str],
        mounts: Mapping[str, Path],
        found: TaskRun,
    ) -> bool:
        """One pod: download, run, upload."""
        pod.mkdir(parents=True)
        for artifacts in executor_input["inputs"]["artifacts"].values():
            uri = artifacts["artifacts"][0]["uri"]
            if self.backend.stored(uri).exists():
                _copy(self.backend.stored(uri), _local(pod, uri))
        here = json.loads(json.dumps(executor_input).replace("/tmp/kfp_outputs", f"{pod}/tmp/kfp_outputs"))
        try:
            arguments = replaced([*container["command"], *container["args"]], here)
            arguments = [after_argo(argument, self.job) for argument in arguments]
        except DriverError as error:
            found.log = f"driver: {error}"
            return False
        kill = None if self.kill is None else lambda folder: self.kill(name, attempt, folder)  # type: ignore[misc]
        began = time.monotonic()
        status, found.log = self.backend._host.run(
            arguments, pod=pod, environment=environment, mounts=mounts, kill=kill
        )
        found.seconds = time.monotonic() - began
        if status != 0:
            return False
        written = json.loads(Path(here["outputs"]["outputFile"]).read_text())
        found.parameters = protojson(written.get("parameterValues", {}))
        for key, artifacts in executor_input["outputs"]["artifacts"].items():
            artifact = dict(artifacts["artifacts"][0])
            [said] = written.get("artifacts", {}).get(key, {"artifacts": [{}]})["artifacts"]
            artifact["metadata"] = protojson(said.get("metadata", {}))
            json_format.ParseDict(artifact, pipeline_spec_pb2.RuntimeArtifact())
            found.artifacts[key] = artifact
            if _local(pod, artifact["uri"]).exists():
                _copy(_local(pod, artifact["uri"]), self.backend.stored(artifact["uri"]))
        shutil.rmtree(pod / "minio", ignore_errors=True)
        return True

    def _environment(self, container: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
        found = {entry["name"]: entry["value"] for entry in container.get("env", [])}
        for secret in config.get("secretAsEnv", []):
            for entry in secret["keyToEnv"]:
                try:
                    found[entry["envVar"]] = self.backend._secrets[secret["secretName"]][entry["secretKey"]]
                except KeyError:
                    if not secret.get("optional"):
                        raise
        return found

    def _outputs(self, name: str, component: Mapping[str, Any]) -> dict[str, Any]:
        declared = component.get("outputDefinitions", {})
        place = f"{_ROOT}/{self.spec['pipelineInfo']['name']}/{self.run.run_id}/{name}/{uuid.uuid4()}"
        return {
            "artifacts": {
                key: {"artifacts": [{"name": key, "type": kind["artifactType"], "uri": f"{place}/{key}"}]}
                for key, kind in declared.get("artifacts", {}).items()
            },
            "parameters": {key: {"outputFile": f"/tmp/kfp_outputs/{key}"} for key in declared.get("parameters", {})},
            "outputFile": "/tmp/kfp_outputs/output_metadata.json",
        }


def _artifacts(
    task: Mapping[str, Any], artifacts: Mapping[str, Any], done: Mapping[str, TaskRun]
) -> dict[str, dict[str, Any]]:
    found = {}
    for key, source in task.get("inputs", {}).get("artifacts", {}).items():
        if "componentInputArtifact" in source:
            found[key] = artifacts[source["componentInputArtifact"]]
        else:
            producer = source["taskOutputArtifact"]
            one = done[producer["producerTask"]].artifacts[producer["outputArtifactKey"]]
            found[key] = {"artifacts": [one]}
    return found


def _ordered(tasks: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Tasks after those that they depend on, exit handlers last."""
    left = dict(tasks)
    while left:
        ready = [name for name, task in left.items() if not set(task.get("dependentTasks", [])) & set(left)]
        assert ready, f"a circle among {sorted(left)}"
        handlers = [name for name in ready if "strategy" in left[name].get("triggerPolicy", {})]
        name = next((name for name in ready if name not in handlers), ready[0])
        yield name, left.pop(name)


def _local(pod: Path, uri: str) -> Path:
    return pod / "minio" / uri.removeprefix("minio://")


def _copy(source: Path, target: Path) -> None:
    """As an object store does: files and their bytes, with neither modes nor empty folders."""
    files = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if path.is_file()]
    for file in files:
        place = target / file.relative_to(source) if source.is_dir() else target
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
