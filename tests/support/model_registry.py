"""Kubeflow's Model Registry on loopback, which checks every request against the models of its own client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from support.loopback import LoopbackServer

_BASE = "/api/model_registry/v1/"
_CREATED = {"registered_models": "RegisteredModelCreate", "model_versions": "ModelVersionCreate"}
_FOUND = {
    "registered_model": "registered_models",
    "model_version": "model_versions",
    "model_artifact": "model_artifacts",
}


def strictly(model: str, document: Any) -> Any:
    """The document as the model, with no field that the model does not know.

    Raises:
        ValueError: a field is unknown, missing or of another type.
    """
    import mr_openapi  # half a second, for two tests

    try:
        found = getattr(mr_openapi, model).from_dict(document)
    except ValidationError as error:
        raise ValueError(f"not a {model}: {error}") from error
    if found.to_dict() != document:
        raise ValueError(f"not a {model}: {document} is read as {found.to_dict()}")
    return document


@dataclass
class RegistryServer(LoopbackServer):
    """A registry; use it as a context.

    Attributes:
        token: that requests must bear; empty for none.
        entries: kind -> what was made, in order.
        fails: paths that are answered with status 500, each once.
    """

    token: str = ""
    entries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    fails: list[str] = field(default_factory=list)

    def made(self, kind: str, document: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Keep an entry under the next id."""
        kept = self.entries.setdefault(kind, [])
        kept.append({**document, **more, "id": str(len(kept) + 1)})
        return kept[-1]

    def refused(self, message: str) -> Any:
        """As the registry's own errors."""
        return {"code": "", "message": message}

    def answer(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], raw: bytes
    ) -> tuple[int, Any]:
        """Status and document of one request."""
        place = path.removeprefix(_BASE)
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, self.refused("unauthenticated")
        if place in self.fails:
            self.fails.remove(place)
            return 500, self.refused("the database is away")
        return self._route(method, place, query, raw)

    def _route(self, method: str, place: str, query: Mapping[str, str], raw: bytes) -> tuple[int, Any]:
        if method == "GET" and place in _FOUND:
            for entry in self.entries.get(_FOUND[place], []):
                parent = entry.get("registeredModelId", entry.get("parent"))
                if entry["name"] == query["name"] and query.get("parentResourceId") in (None, parent):
                    return 200, {name: value for name, value in entry.items() if name != "parent"}
            return 404, self.refused("no such entry")
        if method == "POST" and place in _CREATED:
            return 201, self.made(place, strictly(_CREATED[place], json.loads(raw)))
        parts = place.split("/")
        if method == "POST" and parts[0] == "model_versions" and parts[2:] == ["artifacts"]:
            document = strictly("Artifact", json.loads(raw))
            if parts[1] not in {entry["id"] for entry in self.entries.get("model_versions", [])}:
                return 404, self.refused("no such version")
            made = self.made("model_artifacts", document, parent=parts[1])
            return 201, {name: value for name, value in made.items() if name != "parent"}
        return 404, self.refused(f"no such path: {place}")
