"""The repository extension of the Open Inference Protocol: what is served, brought in and taken out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lazydp.components.shared.errors import LazyDPError, UnavailableError
from lazydp.service.http.problems import Problem, invalid
from lazydp.service.serving.context import Context

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RepositoryModel(BaseModel):
    """Open Inference Protocol, repository extension: one model."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class LoadedModel(BaseModel):
    """What POST /v2/repository/models/{name}/load brought in, or .../unload took out."""

    name: str
    version: str
    durable: bool = Field(description="whether it holds after a restart too; otherwise set state_file")


class IndexRequest(BaseModel):
    """Open Inference Protocol, repository extension: which models are asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ready: bool = Field(default=False, description="only those that are served")


class ChangeParameters(BaseModel):
    """What a client of Triton may say of a load or an unload. A bundle is served as it is, and alone: it takes no
    configuration, no files and no dependents."""

    model_config = ConfigDict(extra="forbid", strict=True)

    unload_dependents: Literal[False] = Field(default=False, description="models are unloaded one by one")


class ChangeRequest(BaseModel):
    """Open Inference Protocol, repository extension: how a model is to be brought in or taken out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    parameters: ChangeParameters = ChangeParameters()


def check_parameters(given: Mapping[str, Any]) -> None:
    """Refuse parameters that are not those of `ChangeParameters`.

    Raises:
        Problem: 422.
    """
    try:
        ChangeParameters.model_validate(given)
    except ValidationError as error:
        raise invalid(error, prefix="/parameters") from None


def index(context: Context, *, ready: bool = False) -> list[RepositoryModel]:
    """Models being served, and bundles of the repository that could be, unless only what is `ready` is wanted."""
    served = {version.name: version for version in context.registry.versions()}
    found = [
        RepositoryModel(name=name, version=version.version, state="READY", reason=context.registry.refused(name) or "")
        for name, version in served.items()
    ]
    if ready:
        return found
    found += [
        RepositoryModel(name=name, version=version, state="UNAVAILABLE", reason="not loaded")
        for name, version in context.registry.repository_names()
        if name not in served
    ]
    return found


async def load(context: Context, name: str) -> LoadedModel:
    """Load what the repository holds under `name`, or else what the configured path of the model points at now.

    Raises:
        Problem: 404 for a model that is nowhere, 422 for a bundle that is refused, 503 where it cannot be remembered.
    """
    name = context.model_called(name)
    if _NAME.fullmatch(name) is None:
        raise Problem(404, "unknown-model", "there can be no model of this name")
    paths = context.registry.paths(name)
    path = context.registry.in_repository(name) or (paths[0] if paths else None)
    if path is None:
        raise Problem(404, "unknown-model", "neither the repository nor the configuration has a model of this name")
    try:
        fresh = await context.registry.load(path, expected_name=name)
    except UnavailableError as error:
        raise _not_remembered(error) from None
    except LazyDPError as error:
        raise Problem(422, "bundle-refused", str(error)) from None
    return LoadedModel(name=fresh.name, version=fresh.version, durable=context.registry.remembers(path))


async def unload(context: Context, name: str) -> LoadedModel:
    """Take a model out.

    Raises:
        Problem: 404 for a model that is not served, 409 for the default one, 503 where it cannot be remembered.
    """
    served = context.served(name)
    try:
        unloaded = await context.registry.unload(served.name)
    except UnavailableError as error:
        raise _not_remembered(error) from None
    if not unloaded:
        raise Problem(409, "default-model", "the default model cannot be unloaded: load another version instead")
    return LoadedModel(name=served.name, version=served.version, durable=context.settings.state_file is not None)


def _not_remembered(error: UnavailableError) -> Problem:
    return Problem(503, "not-remembered", str(error), headers={"retry-after": "1"})
