"""A release behind KServe: the manifest of its InferenceService, written and, where that is asked, applied."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lazydp.components.bundle.reader import Bundle
from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.components.shared.validation import parse_yaml

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_GROUP, _VERSION, _PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
_TEMPLATE = Path(__file__).with_name("inferenceservice.yaml")
# What KServe's storage initializer fetches; MinIO of Kubeflow Pipelines speaks S3.
_FETCHED = ("s3://", "gs://", "pvc://", "https://", "hdfs://", "oci://")
_TIMEOUT_S = 30.0
_CONFLICT, _MISSING, _FORBIDDEN = 409, 404, 403

_log = logging.getLogger("lazydp.deploy")


def inference_service(
    bundle: Path,
    *,
    uri: str,
    name: str,
    namespace: str,
    image: str,
    service_account: str = "",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest.

    Args:
        bundle: the release; one that is not private is refused.
        uri: where KServe fetches it from.
        name: of the InferenceService, and of the model in it.
        namespace: of the InferenceService.
        image: that holds lazydp.
        service_account: of the pods, with the keys of the store; empty for the namespace's default.
        changes: merged over the manifest: mappings field by field (null removes a field), anything else as a whole.

    Raises:
        NotPrivateError: the bundle is not private.
        InputError: KServe does not fetch from such a URI, or the changes are for something else than this service.
    """
    released = Bundle.open(bundle)
    found: dict[str, Any] = yaml.safe_load(_TEMPLATE.read_text())
    metadata = found["metadata"]
    metadata |= {"name": name, "namespace": namespace}
    metadata["annotations"] |= {
        "lazydp/version": released.manifest.version,
        "lazydp/privacy": released.statement.line(),
        "lazydp/run": released.manifest.lineage.run_id,
    }
    predictor = found["spec"]["predictor"]
    if service_account:
        predictor["serviceAccountName"] = service_account
    [container] = predictor["containers"]
    container |= {"image": image, "args": ["serve", "--bundle", "/mnt/models", "--name", name]}
    container["env"] = [
        {"name": entry["name"], "value": storage_uri(uri)} if entry["name"] == "STORAGE_URI" else entry
        for entry in container["env"]
    ]
    merged: dict[str, Any] = _merged(found, changes or {})
    for field in ("apiVersion", "kind"):
        if merged.get(field) != found[field]:
            raise InputError(f"changes: {field} of the InferenceService cannot be changed, found {merged.get(field)!r}")
    return merged


def storage_uri(uri: str) -> str:
    """Where KServe fetches a bundle that Kubeflow Pipelines stored at `uri`.

    Raises:
        InputError: it is nowhere that KServe reaches.
    """
    if uri.startswith("minio://"):
        return "s3://" + uri.removeprefix("minio://")
    if not uri.startswith(_FETCHED):
        raise InputError(
            f"KServe fetches a bundle from {', '.join(_FETCHED)} and not from {uri!r}: give the pipeline an artifact "
            "store that it reaches"
        )
    return uri


def parse_changes(text: str) -> dict[str, Any]:
    """The parameter `changes`, YAML text.

    Raises:
        InputError: not YAML, or no mapping.
    """
    found = parse_yaml(text, where="changes").content if text else {}
    if not isinstance(found, dict):
        raise InputError(f"changes: expected a mapping such as {{spec: {{predictor: ...}}}}, found {found!r:.60}")
    return found


def _merged(base: Any, changes: Any) -> Any:
    """RFC 7386, JSON merge patch."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return copy.deepcopy(changes)
    found = dict(base)
    for name, value in changes.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = _merged(base.get(name), value)
    return found


def in_cluster() -> ApiClient:
    """A client of the API server, as the service account of this pod.

    Raises:
        UnavailableError: this is no pod.
        InputError: the kubernetes client is not installed.
    """
    try:
        from kubernetes import client, config  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InputError("apply needs the kubernetes client: install lazydp[pipelines]") from error
    try:
        config.load_incluster_config()
    except config.ConfigException as error:
        raise UnavailableError(f"apply: no API server is known here: {error}; is this a pod?") from error
    return client.ApiClient()


def apply(manifest: dict[str, Any], client: ApiClient) -> str:
    """Make the InferenceService what the manifest says; the API server refuses fields that it does not know.

    Args:
        manifest: of `inference_service`.
        client: of the API server.

    Returns:
        `created` or `replaced`.

    Raises:
        InputError: the API server refuses it: a field that KServe does not know, or no right to do so.
        UnavailableError: it does not answer, or something else changes the service at the same moment.
    """
    from kubernetes.client import CustomObjectsApi  # noqa: PLC0415 - an extra
    from kubernetes.client.exceptions import ApiException  # noqa: PLC0415 - an extra
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 - an extra

    metadata = manifest["metadata"]
    where = (_GROUP, _VERSION, metadata["namespace"], _PLURAL)
    told = f"InferenceService {metadata['namespace']}/{metadata['name']}"
    service = CustomObjectsApi(client)
    given = {"field_manager": "lazydp", "field_validation": "Strict", "_request_timeout": _TIMEOUT_S}
    try:
        held = _held(service, where, metadata["name"])
        if held is None:
            service.create_namespaced_custom_object(*where, manifest, **given)
            done = "created"
        else:
            service.replace_namespaced_custom_object(*where, metadata["name"], _over(held, manifest), **given)
            done = "replaced"
    except ApiException as error:
        line = f"the API server refuses {told} ({error.status}): {_message(error)}"
        if error.status == _CONFLICT:
            raise UnavailableError(f"{line}; try again") from error
        if error.status == _FORBIDDEN:
            line += "; give the service account of the pipeline's pods the right to create and update InferenceServices"
        raise InputError(line) from error
    except HTTPError as error:
        raise UnavailableError(f"the API server does not answer for {told}: {error}") from error
    _log.info("%s %s: version %s", told, done, metadata["annotations"]["lazydp/version"])
    return done


def _held(service: Any, where: tuple[str, str, str, str], name: str) -> dict[str, Any] | None:
    from kubernetes.client.exceptions import ApiException  # noqa: PLC0415 - an extra

    try:
        found: dict[str, Any] = service.get_namespaced_custom_object(*where, name, _request_timeout=_TIMEOUT_S)
    except ApiException as error:
        if error.status != _MISSING:
            raise
        return None
    return found


def _over(held: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the metadata that others wrote, and the version of the resource that it replaces."""
    metadata = {**held["metadata"], **manifest["metadata"]}
    for field in ("annotations", "labels"):
        both = {**held["metadata"].get(field, {}), **manifest["metadata"].get(field, {})}
        if both:
            metadata[field] = both
    return {**manifest, "metadata": metadata}


def _message(error: Any) -> str:
    """What the API server said, without the rest of its answer."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
