"""The pod that the backend makes of an executor, as a manifest for a validator (`driver/k8s.go` of the backend)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RESOURCES = {
    ("requests", "cpu"): "resourceCpuRequest",
    ("requests", "memory"): "resourceMemoryRequest",
    ("limits", "cpu"): "resourceCpuLimit",
    ("limits", "memory"): "resourceMemoryLimit",
}


def pod_of(executor: str, spec: Mapping[str, Any], platform: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of an executor's pod."""
    container = spec["deploymentSpec"]["executors"][executor]["container"]
    executors = platform["platforms"]["kubernetes"].get("deploymentSpec", {}).get("executors", {})
    config = executors.get(executor, {})
    asked = container.get("resources", {})
    resources: dict[str, dict[str, str]] = {"requests": {}, "limits": {}}
    for (kind, name), field in _RESOURCES.items():
        if field in asked:
            resources[kind][name] = str(asked[field])
    if "accelerator" in asked:
        resources["limits"][asked["accelerator"]["resourceType"]] = str(asked["accelerator"]["resourceCount"])
    volumes, mounts = _volumes(config)
    made: dict[str, Any] = {
        "containers": [
            {
                "name": "main",
                "image": container["image"],
                "command": container["command"],
                "args": container["args"],
                "resources": resources,
                "env": [dict(entry) for entry in container.get("env", [])] + _secrets(config),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
        "restartPolicy": "Never",
    }
    if "imagePullPolicy" in config:
        made["containers"][0]["imagePullPolicy"] = config["imagePullPolicy"]
    if "imagePullSecret" in config:
        made["imagePullSecrets"] = [{"name": secret["secretName"]} for secret in config["imagePullSecret"]]
    if "nodeSelector" in config:
        made["nodeSelector"] = config["nodeSelector"]["labels"]
    if "activeDeadlineSeconds" in config:
        made["activeDeadlineSeconds"] = int(config["activeDeadlineSeconds"])
    if "tolerations" in config:
        made["tolerations"] = [dict(toleration) for toleration in config["tolerations"]]
    labels = config.get("podMetadata", {}).get("labels", {})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": executor, "labels": labels}, "spec": made}


def _secrets(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": entry["envVar"],
            "valueFrom": {"secretKeyRef": {"name": secret["secretName"], "key": entry["secretKey"]}},
        }
        for secret in config.get("secretAsEnv", [])
        for entry in secret["keyToEnv"]
    ]


def _volumes(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    volumes, mounts = [], []
    for claim in config.get("pvcMount", []):
        volumes.append({"name": claim["constant"], "persistentVolumeClaim": {"claimName": claim["constant"]}})
        mounts.append({"name": claim["constant"], "mountPath": claim["mountPath"]})
    for empty in config.get("emptyDirMounts", []):
        volumes.append(
            {
                "name": empty["volumeName"],
                "emptyDir": {"medium": empty["medium"], "sizeLimit": empty["sizeLimit"]},
            }
        )
        mounts.append({"name": empty["volumeName"], "mountPath": empty["mountPath"]})
    return volumes, mounts
