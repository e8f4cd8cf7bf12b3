"""A release in Kubeflow's Model Registry: what it is, where it lies, what privacy it has, and where it came from."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazydp.components.bundle.manifest import FORMAT_VERSION
from lazydp.components.bundle.reader import Bundle
from lazydp.components.shared.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from model_registry.core import ModelRegistryAPIClient

_FORMAT = "lazydp"
_TIMEOUT_S = 60.0
_REFUSED = {401, 403}
# Figures of the statement that a version carries; the whole statement is in the bundle.
_FIGURES = (
    "epsilon",
    "delta",
    "epsilon_user_level",
    "epsilon_without_amplification",
    "privacy_unit",
    "neighbouring_relation",
    "accountant",
    "accountant_version",
    "sampler",
    "noise_multiplier",
    "sampling_prob",
    "steps",
    "guarantee",
)

_log = logging.getLogger("lazydp.register")


@dataclass(frozen=True, slots=True)
class Entered:
    """A version in the registry.

    Attributes:
        model: the registered model's id.
        version: the version's id.
    """

    model: str
    version: str


def register(bundle: Path, *, uri: str, url: str, author: str, token: str = "", job_id: str = "") -> Entered:
    """Enter a release as a version of its model; repeated, the same version again.

    Args:
        bundle: the release; one that is not private is refused.
        uri: where it is stored.
        url: of the registry: scheme, host and port.
        author: who releases it.
        token: bearer token; needed with https.
        job_id: of the pipeline run that made it; empty for none.

    Raises:
        NotPrivateError: the bundle is not private.
        InputError: the client is not installed, or the registry does not accept the token or the request.
        UnavailableError: the registry does not answer.
    """
    try:
        from model_registry.core import ModelRegistryAPIClient  # noqa: PLC0415 - an extra
        from mr_openapi.exceptions import ApiException  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InputError("the client of the model registry is not installed: install lazydp[registry]") from error
    from aiohttp import ClientError  # noqa: PLC0415 - an extra

    released = Bundle.open(bundle)
    secure = url.startswith("https://")
    if secure and not token:
        raise InputError(f"the model registry {url} wants a token: name its secret (`registry.secret` in cluster.yaml)")
    port = 443 if secure else 8080  # where the URL names none
    if secure:
        api = ModelRegistryAPIClient.secure_connection(url, port, user_token=token)
    else:
        api = ModelRegistryAPIClient.insecure_connection(url, port, token or None)
    try:
        entered = asyncio.run(_entered(api, released, uri=uri, author=author, job_id=job_id))
    except ApiException as error:
        line = f"the model registry {url} refuses {released.manifest.name} ({error.status}): {_message(error)}"
        raise InputError(f"{line}; does the token belong to it?" if error.status in _REFUSED else line) from error
    except (ClientError, TimeoutError, OSError) as error:
        raise UnavailableError(f"the model registry {url} does not answer: {error or 'no answer in time'}") from error
    _log.info("model %s, version %s is in %s", released.manifest.name, released.manifest.version, url)
    return entered


def properties(released: Bundle) -> dict[str, str | int | float | bool]:
    """What a version says of itself: figures of its privacy statement, and its lineage. All of it is public."""
    statement, lineage = released.statement.model_dump(mode="json"), released.manifest.lineage
    found = {f"privacy_{name}": statement[name] for name in _FIGURES if statement[name] is not None}
    return {
        **found,
        "privacy_not_covered": "; ".join(statement["not_covered"]),
        "run_id": lineage.run_id,
        "ledger_dataset": lineage.dataset,
        "ledger_head": lineage.ledger_head,
        "config": lineage.config,
        "code_version": lineage.code_version,
        "created": lineage.created,
    }


async def _entered(api: ModelRegistryAPIClient, released: Bundle, *, uri: str, author: str, job_id: str) -> Entered:
    """Model, version and artifact, each made where there is none: a killed attempt is gone on with."""
    from model_registry.types import ModelArtifact, ModelVersion, RegisteredModel  # noqa: PLC0415 - an extra

    name, version = released.manifest.name, released.manifest.version
    async with asyncio.timeout(_TIMEOUT_S):
        model = await api.get_registered_model_by_params(name)
        if model is None:
            model = await api.upsert_registered_model(RegisteredModel(name=name, owner=author))
        entry = await api.get_model_version_by_params(model.id, version)
        if entry is None:
            given = ModelVersion(
                name=version,
                author=author,
                description=released.statement.line(),
                custom_properties=properties(released),
            )
            entry = await api.upsert_model_version(given, model.id)
        if await api.get_model_artifact_by_params(name, entry.id) is None:
            source = {"model_source_kind": "kfp", "model_source_class": "pipelinerun", "model_source_id": job_id}
            artifact = ModelArtifact(
                name=name,
                uri=uri,
                model_format_name=_FORMAT,
                model_format_version=str(FORMAT_VERSION),
                **(source if job_id else {}),
            )
            await api.upsert_model_version_artifact(artifact, entry.id)
    return Entered(str(model.id), str(entry.id))


def _message(error: Any) -> str:
    """What the registry said, without the rest of its answer."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
