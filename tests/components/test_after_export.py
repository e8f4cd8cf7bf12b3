"""What becomes of a release: entered in Kubeflow's Model Registry, and served by KServe."""

import copy
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from kfp import dsl
from kubernetes.client import ApiClient, Configuration

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.deploy import deploy as deploy_module
from lazydp.components.deploy.component import deploy
from lazydp.components.deploy.deploy import apply, inference_service, parse_changes, storage_uri
from lazydp.components.export.export import export
from lazydp.components.register.component import register as register_component
from lazydp.components.register.register import register
from lazydp.components.shared.errors import InputError, NotPrivateError, UnavailableError
from lazydp.components.train.run.train import train
from support.crd import validate
from support.kubernetes_api import KubernetesServer
from support.model_registry import RegistryServer, strictly
from support.tiny import Tiny

KSERVE: dict[str, Any] = {"plural": "inferenceservices", "schema": "inferenceservices.crd.yaml"}
URI = "minio://mlpipeline/v2/artifacts/run/export/bundle"
SERVICE: dict[str, Any] = {"uri": URI, "name": "films", "namespace": "recs", "image": "registry.example/lazydp:1"}


@pytest.fixture(scope="module")
def bundle(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, private."""
    tiny = Tiny(tiny_dataset, tmp_path_factory.mktemp("release"))
    url = tiny.ledger()
    run = train(dataset=tiny.dataset, config=tiny.config(steps=2), out=tiny.folder / "run", ledger=url, run_id="run-j")
    export(run=run.folder, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=url)
    with Ledger.open(url, read_only=True) as ledger:
        assert len(ledger.releases()) == 1
    return tiny.folder / "bundle"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is not private."""
    folder = tmp_path_factory.mktemp("untrained") / "bundle"
    write_untrained(folder, kind="two_tower", num_items=80, dim=8)
    return folder


# --- the registry ------------------------------------------------------------------------------------------------


def test_a_release_is_entered_with_its_privacy_and_lineage(bundle: Path) -> None:
    released = Bundle.open(bundle)
    with RegistryServer() as registry:
        given = {"uri": URI, "url": registry.url, "author": "ada", "job_id": "j"}
        first = register(bundle, **given)
        assert register(bundle, **given) == first, "a retry finds what it made"
    [model], [version], [artifact] = (
        registry.entries[kind] for kind in ("registered_models", "model_versions", "model_artifacts")
    )
    assert (model["name"], model["owner"], version["registeredModelId"]) == ("tiny", "ada", model["id"])
    assert (version["name"], version["author"]) == (released.manifest.version, "ada")
    assert version["description"] == released.statement.line()
    told = {
        name: next(value for field, value in entry.items() if field != "metadataType")
        for name, entry in version["customProperties"].items()
    }
    assert told["privacy_epsilon"] == released.statement.epsilon
    assert told["privacy_delta"] == 1e-5
    assert told["privacy_privacy_unit"] == "example"
    assert told["privacy_steps"] == "2"
    assert "metrics computed on private data" in told["privacy_not_covered"]
    lineage = released.manifest.lineage
    assert told["run_id"] == lineage.run_id == "run-j"
    assert (told["ledger_dataset"], told["ledger_head"]) == (lineage.dataset, lineage.ledger_head)
    assert (told["code_version"], told["config"]) == (lineage.code_version, lineage.config)
    assert (artifact["uri"], artifact["modelFormatName"], artifact["parent"]) == (URI, "lazydp", version["id"])
    assert (artifact["modelSourceKind"], artifact["modelSourceId"]) == ("kfp", "j")


def test_an_attempt_that_failed_midway_is_gone_on_with(bundle: Path) -> None:
    with RegistryServer(fails=["model_versions/1/artifacts"]) as registry:
        with pytest.raises(InputError, match=r"refuses tiny \(500\): the database is away"):
            register(bundle, uri=URI, url=registry.url, author="ada")
        register(bundle, uri=URI, url=registry.url, author="ada")
    assert [len(registry.entries[kind]) for kind in ("registered_models", "model_versions", "model_artifacts")] == [
        1
    ] * 3


def test_the_component_and_its_token(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = SimpleNamespace(path=str(bundle), uri=URI)
    with RegistryServer(token="good") as registry:
        monkeypatch.setenv("LAZYDP_REGISTRY_TOKEN", "bad")
        with pytest.raises(InputError, match=r"\(401\): unauthenticated; does the token belong to it\?"):
            register_component.python_func(bundle=given, url=registry.url)
        monkeypatch.setenv("LAZYDP_REGISTRY_TOKEN", "good")
        assert register_component.python_func(bundle=given, url=registry.url, job_id="j") == "1"


def test_what_is_not_entered(bundle: Path, untrained: Path) -> None:
    with RegistryServer() as registry:
        with pytest.raises(NotPrivateError):
            register(untrained, uri=URI, url=registry.url, author="ada")
        assert registry.entries == {}
    with pytest.raises(InputError, match="wants a token"):
        register(bundle, uri=URI, url="https://registry.example", author="ada")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UnavailableError, match=f"the model registry {dead} does not answer"):
        register(bundle, uri=URI, url=dead, author="ada")


def test_the_registry_refuses_what_its_models_do_not_know() -> None:
    """The check behind the tests above can fail."""
    good = {"name": "x", "registeredModelId": "1", "state": "LIVE"}
    strictly("ModelVersionCreate", good)
    for wrong in ({**good, "registeredModelID": "1"}, {"name": "x"}, {**good, "registeredModelId": "zero"}):
        with pytest.raises(ValueError, match="not a ModelVersionCreate"):
            strictly("ModelVersionCreate", wrong)


# --- KServe ------------------------------------------------------------------------------------------------------


def client_of(server: KubernetesServer) -> ApiClient:
    configuration = Configuration(host=server.url)
    configuration.retries = 0
    return ApiClient(configuration)


def test_the_manifest_is_what_kserve_knows(bundle: Path) -> None:
    changes = parse_changes("spec: {predictor: {maxReplicas: 9, minReplicas: null}}")
    manifest = inference_service(bundle, **SERVICE, service_account="store", changes=changes)
    validate(manifest, KSERVE["schema"])
    predictor = manifest["spec"]["predictor"]
    [container] = predictor["containers"]
    assert container["args"] == ["serve", "--bundle", "/mnt/models", "--name", "films"]
    assert container["image"] == "registry.example/lazydp:1"
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["STORAGE_URI"] == "s3://mlpipeline/v2/artifacts/run/export/bundle"
    assert (predictor["serviceAccountName"], predictor["maxReplicas"]) == ("store", 9)
    assert "minReplicas" not in predictor
    released = Bundle.open(bundle)
    assert manifest["metadata"]["annotations"]["lazydp/version"] == released.manifest.version
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["predictor"]["maxReplica"] = 9
    with pytest.raises(jsonschema.ValidationError):
        validate(wrong, KSERVE["schema"])


def test_the_template_is_the_manifest_of_deploy() -> None:
    root = Path(__file__).parents[2]
    copies = [root / "deploy/kserve/inferenceservice.yaml", root / "components/deploy/inferenceservice.yaml"]
    assert copies[0].read_text() == copies[1].read_text()


def test_it_is_created_and_then_replaced(bundle: Path) -> None:
    manifest = inference_service(bundle, **SERVICE)
    with KubernetesServer(**KSERVE) as server, client_of(server) as client:
        assert apply(manifest, client) == "created"
        [path] = server.objects
        assert path == "/apis/serving.kserve.io/v1beta1/namespaces/recs/inferenceservices/films"
        server.objects[path]["metadata"]["annotations"]["others/own"] = "kept"
        newer = inference_service(bundle, **{**SERVICE, "image": "registry.example/lazydp:2"})
        assert apply(newer, client) == "replaced"
        held = server.objects[path]
        assert held["spec"]["predictor"]["containers"][0]["image"] == "registry.example/lazydp:2"
        assert held["metadata"]["annotations"]["others/own"] == "kept"
        changed = [query for method, _, query in server.requests if method != "GET"]
        assert changed == [{"fieldManager": "lazydp", "fieldValidation": "Strict"}] * 2


def test_a_misspelt_field_or_a_missing_right_is_one_line(bundle: Path) -> None:
    misspelt = inference_service(bundle, **SERVICE, changes={"spec": {"predictor": {"maxReplica": 9}}})
    with KubernetesServer(**KSERVE) as server, client_of(server) as client:
        with pytest.raises(
            InputError, match=r"refuses InferenceService recs/films \(400\): strict decoding.*maxReplica"
        ):
            apply(misspelt, client)
        assert server.objects == {}
        server.forbidden = True
        with pytest.raises(InputError, match=r"\(403\).*give the service account"):
            apply(inference_service(bundle, **SERVICE), client)
    with pytest.raises(UnavailableError, match="does not answer"):
        apply(misspelt, client_of(server))


def test_the_component_writes_and_applies(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"bundle": SimpleNamespace(path=str(bundle), uri=URI)}
    given |= {name: value for name, value in SERVICE.items() if name != "uri"}
    manifest = dsl.Artifact(uri=str(tmp_path / "manifest"))
    assert deploy.python_func(manifest=manifest, **given) == "written"
    validate(yaml.safe_load(Path(manifest.path).read_text()), KSERVE["schema"])
    with pytest.raises(UnavailableError, match="is this a pod"):
        deploy.python_func(manifest=manifest, apply=True, **given)
    with KubernetesServer(**KSERVE) as server:
        monkeypatch.setattr(deploy_module, "in_cluster", lambda: client_of(server))
        assert deploy.python_func(manifest=manifest, apply=True, **given) == "created"


def test_what_is_not_deployed(bundle: Path, untrained: Path) -> None:
    with pytest.raises(NotPrivateError):
        inference_service(untrained, **SERVICE)
    with pytest.raises(InputError, match="kind of the InferenceService cannot be changed"):
        inference_service(bundle, **SERVICE, changes={"kind": "Job"})
    for wrong, expected in (
        ("[1]", "expected a mapping"),
        ("{", "not YAML"),
        ("day: 2024-13-01", "not YAML"),
        ("{spec: {}, spec: {}}", "stands there twice"),
    ):
        with pytest.raises(InputError, match=expected):
            parse_changes(wrong)
    with pytest.raises(InputError, match="KServe fetches a bundle from"):
        storage_uri("/tmp/bundle")
    assert [storage_uri(uri) for uri in ("s3://a/b", "gs://a", "minio://a/b")] == ["s3://a/b", "gs://a", "s3://a/b"]
