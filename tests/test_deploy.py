"""The manifests of deploy/, held strictly against the schemas of what they are, and against the service they run."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from lazydp.pipelines.cli import cli
from lazydp.service.settings import Settings
from support.crd import validate

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*.yaml") if path.name != "kustomization.yaml")
CUSTOM = {
    "InferenceService": "inferenceservices.crd.yaml",
    "ServiceMonitor": "servicemonitors.crd.yaml",
    "TrainJob": "trainjobs.crd.yaml",
    "TrainingRuntime": "trainingruntimes.crd.yaml",
}


def load(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def check(manifest: dict[str, Any]) -> None:
    if manifest["kind"] in CUSTOM:
        validate(manifest, CUSTOM[manifest["kind"]])
    else:
        kubernetes_validate.validate(manifest, "1.37", strict=True)


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["kind"] in {"Deployment", "Job"}:
        return [manifest["spec"]["template"]["spec"]]
    if manifest["kind"] == "TrainingRuntime":
        jobs = manifest["spec"]["template"]["spec"]["replicatedJobs"]
        return [job["template"]["spec"]["template"]["spec"] for job in jobs]
    return [manifest["spec"]["predictor"]] if manifest["kind"] == "InferenceService" else []


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_a_manifest_is_what_its_schema_says(file: Path) -> None:
    for manifest in yaml.safe_load_all(file.read_text()):
        check(manifest)
        for pod in pods(manifest):
            [container] = pod["containers"]
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["resources"].keys() == {"requests", "limits"}
            if manifest["metadata"]["name"] != "lazydp-runs-prepare":  # which changes the owner of a volume
                assert pod["securityContext"]["runAsNonRoot"]
                assert pod["securityContext"]["runAsUser"] == 10001


@pytest.mark.parametrize(
    ("file", "place", "name"),
    [
        ("service/deployment.yaml", ("spec", "template", "spec"), "terminationGracePeriodSecond"),
        ("service/hpa.yaml", ("spec",), "maxReplica"),
        ("service/networkpolicy.yaml", ("spec",), "egresss"),
        ("monitoring/servicemonitor.yaml", ("spec", "endpoints", 0), "intervall"),
        ("kserve/inferenceservice.yaml", ("spec", "predictor"), "minReplica"),
        ("training/trainjob.yaml", ("spec", "trainer"), "numProcsPerNode"),
        ("training/runtime.yaml", ("spec", "mlPolicy"), "numNode"),
        ("kserve/inferenceservice.yaml", ("spec", "predictor", "containers", 0), "readinesProbe"),
    ],
)
def test_a_misspelt_field_is_refused(file: str, place: tuple[Any, ...], name: str) -> None:
    manifest = load(file)
    check(manifest)
    wrong = copy.deepcopy(manifest)
    target = wrong
    for step in place:
        target = target[step]
    target[name] = 1
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        check(wrong)


def test_the_configuration_is_one_that_the_service_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(**yaml.safe_load(load("service/configmap.yaml")["data"]["serve.yaml"]))
    secret = load("service/secret.example.yaml")["stringData"]
    monkeypatch.setenv("LAZYDP_SERVE_API_KEYS", secret["api_keys"])
    assert [key.name for key in Settings().api_keys] == ["shop"]
    for file in ("service/deployment.yaml", "kserve/inferenceservice.yaml"):
        [pod] = pods(load(file))
        assert pod["terminationGracePeriodSeconds"] > settings.drain_s + settings.drain_delay_s, file
    [container] = pods(load("service/deployment.yaml"))[0]["containers"]
    assert container["ports"][0]["containerPort"] == settings.port
    assert {entry["valueFrom"]["secretKeyRef"]["key"] for entry in container["env"]} == set(secret)


def test_probes_ask_paths_that_need_no_key() -> None:
    from lazydp.service.http.auth import OPEN_PATHS

    for file in ("service/deployment.yaml", "kserve/inferenceservice.yaml"):
        [container] = pods(load(file))[0]["containers"]
        paths = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert paths <= OPEN_PATHS


def test_the_train_job_runs_a_command_of_lazydp_in_its_runtime() -> None:
    job, runtime = load("training/trainjob.yaml"), load("training/runtime.yaml")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["trainer"]["command"] == ["torchrun", "-m", "lazydp.pipelines.cli"]
    name, *arguments = job["spec"]["trainer"]["args"]
    with click.Context(cli, info_name="lazydp") as context:
        command = cli.get_command(context, name)
        assert command is not None
        given = command.make_context(name, list(arguments), parent=context).params
    assert given["resume"]  # all pods start again if one fails
    [pod] = pods(runtime)
    mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert str(given["out"].parent) in mounted
    # The policy is about these pods.
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["spec"]["template"]["metadata"]["labels"]
    assert load("training/networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"] == labels


@pytest.mark.parametrize("name", sorted(path.parent.name for path in DEPLOY.rglob("kustomization.yaml")))
def test_a_base_holds_every_manifest_but_the_examples(name: str) -> None:
    folder = DEPLOY / name
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    manifests = {path.name for path in folder.glob("*.yaml") if ".example." not in path.name}
    assert set(listed) == manifests - {"kustomization.yaml"}
    if shutil.which("kubectl") is not None:
        built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
        assert len(list(yaml.safe_load_all(built))) == len(listed)


def test_the_containerfile_passes_its_linter(tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        assert not os.environ.get("CI"), "hadolint is missing, and CI must not skip this"
        pytest.skip("hadolint is not installed")
    subprocess.run([hadolint, str(DEPLOY.parent / "Containerfile")], check=True)
    wrong = tmp_path / "Containerfile"
    wrong.write_text("FROM python\nRUN cd /x && apt-get install g++\n")
    assert subprocess.run([hadolint, str(wrong)], capture_output=True, check=False).returncode != 0
