"""Kubernetes' API server on loopback, as far as custom resources go, which it holds to their published schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from support.crd import validate
from support.loopback import LoopbackServer


@dataclass
class KubernetesServer(LoopbackServer):
    """An API server with one kind of custom resource; with fieldValidation=Strict unknown fields are refused.

    Attributes:
        plural: the kind, as paths name it.
        schema: file of its schema (`support.crd`).
        objects: path -> what is there.
        forbidden: whether every change is refused.
        requests: method, path and query of each request.
    """

    plural: str
    schema: str
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    forbidden: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def answer(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], raw: bytes
    ) -> tuple[int, Any]:
        """Status and document of one request."""
        self.requests.append((method, path, dict(query)))
        if f"/{self.plural}" not in path:
            return _failed(404, f"the server could not find {path}")
        if method == "GET":
            return (200, self.objects[path]) if path in self.objects else _failed(404, "not found")
        if self.forbidden:
            return _failed(403, "cannot create resource in API group")
        return self._change(method, path, query, json.loads(raw))

    def _change(self, method: str, path: str, query: Mapping[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if query.get("fieldValidation") == "Strict":
            try:
                validate(body, self.schema)
            except jsonschema.ValidationError as error:
                return _failed(400, f"strict decoding error: {error.message}")
        metadata = body["metadata"]
        if method == "POST":
            path += f"/{metadata['name']}"
            if path in self.objects:
                return _failed(409, "already exists")
            version = 1
        else:
            held = self.objects[path]["metadata"]["resourceVersion"]
            if metadata.get("resourceVersion") != held:
                return _failed(409, "the object has been modified")
            version = int(held) + 1
        self.objects[path] = {**body, "metadata": {**metadata, "resourceVersion": str(version)}}
        return 200, self.objects[path]


def _failed(status: int, message: str) -> tuple[int, Any]:
    return status, {"kind": "Status", "status": "Failure", "message": message, "code": status}
