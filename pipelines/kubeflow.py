"""Talks to the API of Kubeflow Pipelines: uploads a package, starts a run or a recurring one, waits for its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import kfp_server_api as api
import urllib3
from kfp_server_api.exceptions import ApiException

from lazydp.components.shared.errors import InputError, LazyDPError, UnavailableError

# Where Kubeflow mounts the token of a pod that may call its API.
SERVICE_ACCOUNT_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"  # noqa: S105 - a path
_TIMEOUT_S = 30.0
_DONE = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
_OURS = re.compile(r"lazydp\.components\.shared\.errors\.\w+Error: (?P<error>.*)")
_CRON_FIELDS = 6


class RunFailedError(LazyDPError):
    """A run on the cluster failed; the message is what its task said."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A version of a pipeline."""

    pipeline_id: str
    version_id: str
    version: str


@dataclass(frozen=True, slots=True)
class Order:
    """A run that is asked for.

    Attributes:
        experiment: its id.
        name: of the run.
        parameters: of the pipeline.
        service_account: that the run's pods use; None for Kubeflow's default.
    """

    experiment: str
    name: str
    parameters: Mapping[str, Any]
    service_account: str | None


class Kubeflow:
    """A client of one Kubeflow; use it as a context.

    Args:
        host: URL of the API (what a browser shows before `/#/`, or a port-forward of the service ml-pipeline).
        namespace: of the user's profile; empty on a single-user installation.
        token: gives the bearer token, asked before each request, for tokens that are renewed; None for none.
        certificate: file of the authority that signed the host's certificate; None for the system's.
    """

    def __init__(
        self, host: str, *, namespace: str, token: Callable[[], str] | None = None, certificate: Path | None = None
    ) -> None:
        if not host.startswith(("http://", "https://")):
            raise InputError(f"--host: expected a URL such as https://kubeflow.example/pipeline, found {host!r}")
        self.host = host.rstrip("/")
        self._namespace = namespace
        configuration = api.Configuration(host=self.host)
        configuration.retries = urllib3.Retry(total=0, redirect=0)
        if certificate is not None:
            configuration.ssl_ca_cert = str(certificate)
        if token is not None:
            configuration.api_key_prefix["authorization"] = "Bearer"
            configuration.api_key["authorization"] = "asked for"

            def refresh(held: Any) -> None:
                held.api_key["authorization"] = token()

            configuration.refresh_api_key_hook = refresh
        self._client = api.ApiClient(configuration)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def link(self, run_id: str) -> str:
        """The page of a run."""
        return f"{self.host}/#/runs/details/{run_id}"

    def experiment(self, name: str, *, create: bool) -> str:
        """The id of an experiment.

        Raises:
            InputError: there is none of that name, and it was not to be made.
        """
        service = api.ExperimentServiceApi(self._client)
        with self._translated():
            found = service.experiment_service_list_experiments(
                namespace=self._namespace, filter=_named(name), page_size=1, _request_timeout=_TIMEOUT_S
            ).experiments
            if found:
                return str(found[0].experiment_id)
            if not create:
                raise InputError(
                    f"Kubeflow at {self.host} has no experiment {name!r} in namespace {self._namespace or '(none)'}: "
                    "give the name of one that exists, or --create-experiment"
                )
            body = api.V2beta1Experiment(display_name=name, namespace=self._namespace or None)
            made = service.experiment_service_create_experiment(experiment=body, _request_timeout=_TIMEOUT_S)
            return str(made.experiment_id)

    def upload(self, package: Path, *, name: str) -> Uploaded:
        """Make the package a version of the pipeline `name`; one with the same content is found again.

        Args:
            package: what `compile_package` wrote.
            name: of the pipeline; it is made where there is none.
        """
        digest = hashlib.sha256(package.read_bytes()).hexdigest()[:12]
        version = f"{name}-{digest}"
        service, uploads = api.PipelineServiceApi(self._client), api.PipelineUploadServiceApi(self._client)
        with self._translated():
            found = service.pipeline_service_list_pipelines(
                namespace=self._namespace, filter=_named(name), page_size=1, _request_timeout=_TIMEOUT_S
            ).pipelines
            if not found:
                made = uploads.upload_pipeline(
                    str(package), name=name, namespace=self._namespace, _request_timeout=_TIMEOUT_S
                )
                first = service.pipeline_service_list_pipeline_versions(
                    made.pipeline_id, page_size=1, _request_timeout=_TIMEOUT_S
                ).pipeline_versions[0]
                return Uploaded(str(made.pipeline_id), str(first.pipeline_version_id), str(first.display_name))
            pipeline_id = str(found[0].pipeline_id)
            same = service.pipeline_service_list_pipeline_versions(
                pipeline_id, filter=_named(version), page_size=1, _request_timeout=_TIMEOUT_S
            ).pipeline_versions
            if not same:
                same = [
                    uploads.upload_pipeline_version(
                        str(package), name=version, pipelineid=pipeline_id, _request_timeout=_TIMEOUT_S
                    )
                ]
            return Uploaded(pipeline_id, str(same[0].pipeline_version_id), version)

    def start(self, uploaded: Uploaded, order: Order) -> str:
        """Start a run; returns its id."""
        body = api.V2beta1Run(
            experiment_id=order.experiment,
            display_name=order.name,
            pipeline_version_reference=_reference(uploaded),
            runtime_config=api.V2beta1RuntimeConfig(parameters=dict(order.parameters)),
            service_account=order.service_account,
        )
        with self._translated():
            made = api.RunServiceApi(self._client).run_service_create_run(run=body, _request_timeout=_TIMEOUT_S)
            return str(made.run_id)

    def schedule(self, uploaded: Uploaded, order: Order, *, cron: str) -> str:
        """Start a recurring run, one at a time and without those that were missed; returns its id.

        Args:
            cron: five fields, as cron writes them, or six, with seconds first, as Kubeflow does.
        """
        body = api.V2beta1RecurringRun(
            experiment_id=order.experiment,
            display_name=order.name,
            pipeline_version_reference=_reference(uploaded),
            runtime_config=api.V2beta1RuntimeConfig(parameters=dict(order.parameters)),
            service_account=order.service_account,
            namespace=self._namespace or None,
            max_concurrency="1",
            no_catchup=True,
            mode=api.RecurringRunMode.ENABLE,
            trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron_of(cron))),
        )
        with self._translated():
            service = api.RecurringRunServiceApi(self._client)
            made = service.recurring_run_service_create_recurring_run(recurring_run=body, _request_timeout=_TIMEOUT_S)
            return str(made.recurring_run_id)

    def wait(self, run_id: str, *, show: Callable[[str], None], poll_s: float) -> None:
        """Wait for the end of a run, and show each task as it changes.

        Raises:
            RunFailedError: the run did not succeed; the message is the last line of the task that failed.
        """
        service = api.RunServiceApi(self._client)
        shown: dict[str, str] = {}
        while True:
            with self._translated():
                run = service.run_service_get_run(run_id, _request_timeout=_TIMEOUT_S)
            tasks = list(run.run_details.task_details or []) if run.run_details is not None else []
            for task in tasks:
                state = str(task.state or "PENDING")
                if task.display_name and shown.get(task.task_id) != state and not task.display_name.endswith("driver"):
                    shown[task.task_id] = state
                    show(f"{task.display_name}: {state.lower()}")
            if run.state in _DONE:
                break
            time.sleep(poll_s)
        if run.state != "SUCCEEDED":
            raise RunFailedError(
                f"run {run_id} {str(run.state).lower()}: {self._why(run, tasks)} ({self.link(run_id)})"
            )

    def _why(self, run: Any, tasks: list[Any]) -> str:
        """The failing task's own last line; where its log is gone, what Kubeflow says."""
        failed = [task for task in tasks if task.state == "FAILED" and not (task.display_name or "").endswith("driver")]
        for task in failed:
            pods = [task.pod_name, *(child.pod_name for child in task.child_tasks or [])]
            for pod in filter(None, pods):
                line = self._last_line(str(run.run_id), str(pod))
                if line:
                    return f"{task.display_name}: {line}"
        for task in failed:
            if task.error is not None and task.error.message:
                return f"{task.display_name}: {' '.join(str(task.error.message).split())}"
        return str(run.error.message) if run.error is not None and run.error.message else "Kubeflow says no more"

    def _last_line(self, run_id: str, pod: str) -> str:
        with contextlib.suppress(ApiException, urllib3.exceptions.HTTPError, LazyDPError):
            text = self._client.call_api(
                f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log",
                "GET",
                header_params={"Accept": "text/plain"},
                auth_settings=["Bearer"],
                _return_http_data_only=True,
                _preload_content=False,
                _request_timeout=_TIMEOUT_S,
            ).data.decode(errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            ours = [found["error"] for line in lines if (found := _OURS.search(line))]
            return str(ours[-1] if ours else lines[-1] if lines else "")
        return ""

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """What goes wrong on the way, as one line that names the host."""
        try:
            yield
        except ApiException as error:
            raise self._refused(error) from error
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise UnavailableError(
                f"Kubeflow at {self.host} does not answer: {' '.join(str(reason).split())[:200]}; is the address right?"
            ) from error
        except (TypeError, ValueError) as error:
            raise UnavailableError(
                f"{self.host} answers, but not as the API of Kubeflow Pipelines does ({type(error).__name__}): give "
                "the URL of its API, with a token that passes the login in front of it"
            ) from error

    def _refused(self, error: ApiException) -> LazyDPError:
        try:
            message = str(json.loads(error.body).get("error", "") or json.loads(error.body).get("message", ""))
        except (TypeError, ValueError, AttributeError):
            message = ""
        said = " ".join((message or str(error.reason) or "").split())[:300]
        if error.status in {301, 302, 303, 307, 401, 403}:
            return InputError(
                f"Kubeflow at {self.host} does not accept the token ({error.status} {said}): give a valid one with "
                "--token-file, LAZYDP_KUBEFLOW_TOKEN or --in-cluster"
            )
        if error.status in {400, 404, 409}:
            return InputError(f"Kubeflow at {self.host} refuses the request ({error.status}): {said}")
        return UnavailableError(f"Kubeflow at {self.host} failed ({error.status}): {said}")


def cron_of(text: str) -> str:
    """A schedule with the seconds that Kubeflow wants.

    Raises:
        InputError: neither five nor six fields.
    """
    fields = text.split()
    if len(fields) == _CRON_FIELDS - 1:
        fields = ["0", *fields]
    if len(fields) != _CRON_FIELDS or not all(re.fullmatch(r"[-*/,?A-Za-z0-9#]+", field) for field in fields):
        raise InputError(
            f"--schedule: expected a cron line such as '30 2 * * *' (or six fields, seconds first), found {text!r}"
        )
    return " ".join(fields)


def token_of(*, file: Path | None, in_cluster: bool, environment: Mapping[str, str]) -> Callable[[], str] | None:
    """Where the token comes from: a file, the service account of this pod, or LAZYDP_KUBEFLOW_TOKEN; None for none.

    Raises:
        InputError: when the token is asked for: the file cannot be read, or is empty.
    """
    path = file if file is not None else Path(SERVICE_ACCOUNT_TOKEN) if in_cluster else None
    held = environment.get("LAZYDP_KUBEFLOW_TOKEN", "").strip()
    if path is None:
        return (lambda: held) if held else None

    def read() -> str:
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise InputError(f"the token {path} cannot be read: {error.strerror}") from error
        if not token:
            raise InputError(f"the token {path} is empty")
        return token

    return read


def _named(name: str) -> str:
    predicate = {"operation": "EQUALS", "key": "display_name", "string_value": name}
    return json.dumps({"predicates": [predicate]})


def _reference(uploaded: Uploaded) -> Any:
    return api.V2beta1PipelineVersionReference(
        pipeline_id=uploaded.pipeline_id, pipeline_version_id=uploaded.version_id
    )
