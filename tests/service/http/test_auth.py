"""Who may ask what."""

import base64
import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from lazydp.components.shared.errors import InputError
from lazydp.service.app import document
from lazydp.service.cli import command
from lazydp.service.http import auth
from lazydp.service.settings import ApiKey, Settings, load_settings

OPEN = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
DOCUMENTED = document()["paths"]
PATHS = [*sorted(DOCUMENTED), "/openapi.json", "/assets/page.css", "/nothing"]
KEYS = {scope: auth.make_key() for scope in ("recommend", "budget", "metrics", "admin")}
SCOPES = {
    "/v1/recommendations": "recommend",
    "/v1/users/{user_id}/recommendations": "recommend",
    "/v1/items/{item_id}/similar": "recommend",
    "/v1/models": "recommend",
    "/v1/privacy/budget": "budget",
    "/v1/privacy/releases": "budget",
    "/": "budget",
    "/report": "budget",
    "/try": "recommend",
    "/traffic": "metrics",
    "/metrics": "metrics",
    "/v2/repository/index": "admin",
    "/v2/repository/models/{name}/load": "admin",
    "/v2/models/{name}/infer": "recommend",
}


@pytest.fixture(scope="module")
def guarded(start: Any, bundles: dict[str, Path]) -> Iterator[httpx.Client]:
    keys = [{"name": scope, "sha256": digest, "scopes": [scope]} for scope, (_, digest) in KEYS.items()]
    with start(bundles["towers"], api_keys=keys) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def filled(path: str) -> str:
    return path.replace("{name}", "untrained").replace("{user_id}", "7").replace("{item_id}", "5")


def methods(path: str) -> list[str]:
    return [method.upper() for method in DOCUMENTED.get(path, {"get": None})]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        {"authorization": "Bearer"},
        bearer(KEYS["recommend"][1]),
        {"authorization": KEYS["recommend"][0]},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic " + base64.b64encode(KEYS["recommend"][0].encode()).decode()},
        {"x-api-key": KEYS["recommend"][0] + "x"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
    ids=range(9),
)
def test_without_a_key_or_with_a_wrong_one_only_health_answers(
    guarded: httpx.Client, path: str, headers: dict[str, str]
) -> None:
    for method in methods(path):
        response = guarded.request(method, filled(path), headers=headers)
        if path in OPEN:
            assert response.status_code == 200
        else:
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert response.json()["type"] in ("urn:lazydp:problem:no-key", "urn:lazydp:problem:wrong-key")


def test_an_upgrade_to_another_protocol_goes_around_nothing(guarded: httpx.Client) -> None:
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert guarded.get("/v1/models", headers=upgrade).status_code == 401
    assert guarded.get("/v1/models", headers={**upgrade, **bearer(KEYS["recommend"][0])}).status_code == 200


@pytest.mark.parametrize("path", SCOPES)
@pytest.mark.parametrize("scope", KEYS)
def test_a_key_opens_its_scope_and_no_other(guarded: httpx.Client, path: str, scope: str) -> None:
    for method in methods(path):
        status = guarded.request(method, filled(path), headers=bearer(KEYS[scope][0])).status_code
        assert (status == 403) == (SCOPES[path] != scope), (method, path, scope, status)
        assert status != 401


def test_every_path_with_answers_has_a_scope() -> None:
    assert {path for path in DOCUMENTED.keys() - OPEN if not auth.needed_scopes(path)} == {"/docs"}


def test_every_key_opens_the_documentation(guarded: httpx.Client) -> None:
    assert guarded.get("/docs", headers=bearer(KEYS["budget"][0])).status_code == 200


def test_other_ways_to_bring_a_key(guarded: httpx.Client) -> None:
    key = KEYS["recommend"][0]
    assert guarded.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    assert guarded.get("/v1/models", auth=("anybody", key)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/%76%31/models",
        "/V1/models",
        "/healthz/../v1/models",
        "/healthz;/v1/models",
        "/v1/privacy%2fbudget",
    ],
)
def test_no_spelling_of_a_path_goes_around_the_keys(guarded: httpx.Client, path: str) -> None:
    request = guarded.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    assert guarded.send(request).status_code == 401
    request.headers["authorization"] = f"Bearer {KEYS['admin'][0]}"
    assert guarded.send(request).status_code in (403, 404)


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)  # type: ignore[func-returns-value]
    keys = [ApiKey(name=scope, sha256=digest, scopes=frozenset({"recommend"})) for scope, (_, digest) in KEYS.items()]
    headers = {b"authorization": f"Bearer {KEYS['recommend'][0]}".encode()}
    assert auth.KeyCheck(keys).admit("/v1/models", headers) == "recommend"
    assert len(compared) == len(KEYS)


def test_an_address_is_not_left_open_by_accident() -> None:
    with pytest.raises(InputError, match="no API key is set"):
        load_settings(host="0.0.0.0").refuse_open_address()
    with pytest.raises(InputError, match="no API key is set"):
        load_settings(host="example.org").refuse_open_address()
    for settings in (
        load_settings(),
        load_settings(host="::1"),
        load_settings(host="localhost"),
        load_settings(host="0.0.0.0", allow_anonymous=True),
        load_settings(host="0.0.0.0", api_keys=[{"name": "a", "sha256": "0" * 64, "scopes": ["admin"]}]),
    ):
        settings.refuse_open_address()


def test_settings_come_from_options_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nhost: a\nthreads: 3\nbundles: [x, y]\n")
    monkeypatch.setenv("LAZYDP_SERVE_PORT", "2")
    monkeypatch.setenv("LAZYDP_SERVE_HOST", "b")
    monkeypatch.setenv("LAZYDP_SERVE_API_KEYS", '[{"name":"a","sha256":"' + "0" * 64 + '","scopes":["admin"]}]')
    settings = load_settings(file, port=3)
    assert (settings.port, settings.host, settings.threads) == (3, "b", 3)
    assert settings.bundles == (Path("x"), Path("y"))
    assert settings.api_keys[0].scopes == {"admin"}


def test_help_lists_every_setting_and_what_it_is_by_default() -> None:
    output = CliRunner().invoke(command, ["--help"], terminal_width=200).output
    lines = {line.split()[0]: line for line in output.splitlines() if line.split()}
    for name, field in Settings.model_fields.items():
        assert field.description
        assert field.description[:40] in lines[name], name
    assert lines["port"].endswith("[8000]")
    assert lines["access_log"].endswith("[true]")
    assert not lines["repository"].endswith("]")


@pytest.mark.parametrize(
    ("text", "words"),
    [("port: x\n", "setting port"), ("nothing: 1\n", "setting nothing"), ("tls_key: a\n", "tls_certificate")],
)
def test_wrong_settings_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        load_settings(file)
    with pytest.raises(InputError, match="no configuration"):
        load_settings(tmp_path / "other.yaml")
