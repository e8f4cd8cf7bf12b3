"""An API server of Kubeflow Pipelines on loopback, which checks every request against the models of kfp-server-api."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email import message_from_bytes
from types import SimpleNamespace
from typing import Any

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from support.loopback import LoopbackServer

NOW = "2026-01-01T00:00:00Z"


@dataclass
class ApiServer(LoopbackServer):
    """A server with one experiment, `Default`; use it as a context.

    Attributes:
        token: what a request must bear.
        requests: method, path and checked body of each request.
        outcome: the state that runs end in.
        log: of the task that fails.
    """

    token: str = "good"
    outcome: str = "SUCCEEDED"
    log: str = ""
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    experiments: dict[str, str] = field(default_factory=lambda: {"Default": "e-1"})
    pipelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    looks: int = 0

    def bodies(self, path: str) -> list[Any]:
        """The bodies that were posted to a path."""
        return [body for method, where, body in self.requests if method == "POST" and where == path]

    def answer(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], raw: bytes
    ) -> tuple[int, Any]:
        """Status and document of one request."""
        if headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Unauthenticated: token is not valid"}
        return self._route(method, path, query, raw, headers)

    def _route(  # noqa: PLR0911 - one line for each path
        self, method: str, path: str, query: Mapping[str, str], raw: bytes, headers: Mapping[str, str]
    ) -> tuple[int, Any]:
        place = path.removeprefix("/apis/v2beta1/")
        if (method, place) == ("POST", "runs"):
            body = strictly("V2beta1Run", self._json(path, raw))
            self._check_reference(body["pipeline_version_reference"])
            return 200, {**body, "run_id": "run-1", "created_at": NOW}
        if (method, place) == ("POST", "recurringruns"):
            body = strictly("V2beta1RecurringRun", self._json(path, raw))
            self._check_reference(body["pipeline_version_reference"])
            return 200, {**body, "recurring_run_id": "rec-1", "created_at": NOW}
        if (method, place) == ("POST", "experiments"):
            body = strictly("V2beta1Experiment", self._json(path, raw))
            self.experiments[body["display_name"]] = "e-2"
            return 200, {**body, "experiment_id": "e-2"}
        if place == "experiments":
            name = _wanted(query)
            found = (
                [{"experiment_id": self.experiments[name], "display_name": name}] if name in self.experiments else []
            )
            return 200, {"experiments": found}
        if place == "pipelines":
            name = _wanted(query)
            return 200, {"pipelines": [self.pipelines[name]["pipeline"]] if name in self.pipelines else []}
        if place in {"pipelines/upload", "pipelines/upload_version"}:
            return 200, self._upload(path, query, raw, headers)
        if place.startswith("pipelines/") and place.endswith("/versions"):
            [pipeline] = [found for found in self.pipelines.values() if found["id"] == place.split("/")[1]]
            versions = pipeline["versions"]
            if "filter" in query:
                versions = [version for version in versions if version["display_name"] == _wanted(query)]
            return 200, {"pipeline_versions": versions}
        if place == "runs/run-1":
            return 200, self._run()
        if path == "/apis/v1alpha1/runs/run-1/nodes/pod-of-train/log":
            return 200, self.log
        return 404, {"error": f"no such path: {path}"}

    def _json(self, path: str, raw: bytes) -> Any:
        body = json.loads(raw)
        self.requests.append(("POST", path, body))
        return body

    def _check_reference(self, reference: dict[str, str]) -> None:
        for pipeline in self.pipelines.values():
            versions = [version["pipeline_version_id"] for version in pipeline["versions"]]
            if reference["pipeline_id"] == pipeline["id"] and reference["pipeline_version_id"] in versions:
                return
        raise ValueError(f"no such version: {reference}")

    def _upload(self, path: str, query: Mapping[str, str], raw: bytes, headers: Mapping[str, str]) -> Any:
        """A package: multipart, with a pipeline that the backend's own message reads."""
        message = message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + raw)
        [part] = message.get_payload()  # type: ignore[str-unpack]
        assert part.get_param("name", header="content-disposition") == "uploadfile"  # type: ignore[union-attr]
        spec = next(yaml.safe_load_all(part.get_payload(decode=True)))  # type: ignore[arg-type, union-attr]
        json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        self.requests.append(("POST", path, dict(query)))
        pipelines = self.pipelines
        if path.endswith("/upload"):
            name, number = query["name"], f"p-{len(pipelines) + 1}"
            pipelines[name] = {
                "id": number,
                "pipeline": {"pipeline_id": number, "display_name": name, "namespace": query.get("namespace", "")},
                "versions": [{"pipeline_id": number, "pipeline_version_id": "v-1", "display_name": name}],
            }
            return pipelines[name]["pipeline"]
        [pipeline] = [found for found in pipelines.values() if found["id"] == query["pipelineid"]]
        version = {
            "pipeline_id": pipeline["id"],
            "pipeline_version_id": f"v-{len(pipeline['versions']) + 1}",
            "display_name": query["name"],
        }
        pipeline["versions"].append(version)
        return version

    def _run(self) -> Any:
        """One look: the first finds the run running, the second finds it at its end."""
        self.looks += 1
        over = self.looks > 1
        states = {"ingest": "SUCCEEDED", "train": self.outcome if over else "RUNNING"}
        tasks = [
            {"task_id": name, "run_id": "run-1", "display_name": name, "state": state, "pod_name": f"pod-of-{name}"}
            for name, state in states.items()
        ]
        state = self.outcome if over else "RUNNING"
        return {"run_id": "run-1", "state": state, "run_details": {"task_details": tasks}}


def strictly(model: str, document: Any) -> Any:
    """The document as the model, with no field that the model does not know.

    Raises:
        ValueError: a field is unknown or of another type.
    """
    client = api.ApiClient()
    found = client.deserialize(SimpleNamespace(data=json.dumps(document)), model)
    if client.sanitize_for_serialization(found) != document:
        raise ValueError(f"not a {model}: {document}")
    return document


def _wanted(query: Mapping[str, str]) -> str:
    [predicate] = strictly("V2beta1Filter", json.loads(query["filter"]))["predicates"]
    assert predicate["key"] == "display_name"
    return str(predicate["string_value"])
