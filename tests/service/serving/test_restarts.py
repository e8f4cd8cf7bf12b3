"""A service that is stopped answers what it began; one that is killed forgets nothing that it acknowledged."""

import contextlib
import http.client
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.shared.errors import FormatError
from lazydp.service.serving.state_file import Loaded, State
from support.service_load import Load, eventually, point
from support.service_process import Process

QUERY = b'{"user_id":"7","k":5}'


@contextlib.contextmanager
def serving(bundle: Path, **settings: object) -> Iterator[Process]:
    service = Process(bundle, **settings)
    try:
        service.wait_until_ready()
        yield service
    finally:
        if service.process.poll() is None:
            service.process.kill()
        service.process.wait()


def answers(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz")
    except httpx.TransportError:
        return False
    return True


def test_a_stop_under_load_fails_no_request_behind_a_retrying_client(bundles: dict[str, Path]) -> None:
    with serving(bundles["towers"]) as service, Load(service.url, retrying=True) as load:
        load.until(30)
        assert service.stop(signal.SIGTERM) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        before = load.count
        service.start()
        load.until(before + 30)
    assert load.failures == []


def test_requests_under_way_are_answered_before_the_process_goes(bundles: dict[str, Path]) -> None:
    with serving(bundles["towers"]) as service:
        held = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
        held.putrequest("POST", "/v1/recommendations")
        held.putheader("content-type", "application/json")
        held.putheader("content-length", str(len(QUERY)))
        held.endheaders(QUERY[:5])
        # The head is with the service once it has counted the request.
        eventually(lambda: "lazydp_requests_in_flight 2.0" in httpx.get(f"{service.url}/metrics").text)
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: not answers(service.url))
        assert service.process.poll() is None
        held.send(QUERY[5:])
        answer = held.getresponse()
        assert answer.status == 200
        assert len(json.loads(answer.read())["items"]) == 5
        held.close()
        service.process.wait(timeout=30)


def test_readiness_goes_before_the_door_closes(bundles: dict[str, Path]) -> None:
    with serving(bundles["towers"], drain_delay_s=1) as service:
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{service.url}/readyz").status_code != 200)
        answer = httpx.post(f"{service.url}/v1/recommendations", json={"user_id": "7"})
        assert answer.status_code == 200
        service.process.wait(timeout=30)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose folder `untrained` is a link to one of two versions."""
    root = tmp_path / "repository"
    root.mkdir()
    for seed in (1, 2):
        write_untrained(root / f"version-{seed}", num_items=60, seed=seed)
    return root


def choose(repository: Path, target: str) -> str:
    """Make `target` the version of `untrained`; returns its name."""
    point(repository / "untrained", target)
    return BundleManifest.load(repository / target).version


def load(service: Process, name: str = "untrained") -> dict[str, Any]:
    answer = httpx.post(f"{service.url}/v2/repository/models/{name}/load", timeout=30)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_kill_under_load_loses_nothing_acknowledged(
    bundles: dict[str, Path], repository: Path, tmp_path: Path
) -> None:
    settings = {"repository": repository, "state_file": tmp_path / "state.json"}
    with serving(bundles["towers"], **settings) as service, Load(service.url, retrying=True) as clients:
        for number in (1, 2):
            expected = choose(repository, f"version-{number}")
            assert load(service) == {"name": "untrained", "version": expected, "durable": True}
            service.stop(signal.SIGKILL)
            # What is pointed at afterwards was not acknowledged.
            choose(repository, f"version-{3 - number}")
            service.start()
            service.wait_until_ready()
            assert service.version() == expected
        clients.until(clients.count + 10)
    assert clients.failures == []
    assert clients.retried


def test_without_a_state_file_the_answer_says_that_it_will_be_forgotten(
    start: Any, bundles: dict[str, Path], repository: Path
) -> None:
    choose(repository, "version-1")
    with start(bundles["towers"], repository=repository) as client:
        assert client.post("/v2/repository/models/untrained/load").json()["durable"] is False
    with start(bundles["towers"]) as client:
        assert client.post("/v2/repository/models/untrained/load").json()["durable"] is True


def test_unloads_are_remembered_and_loads_undo_them(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    def names(client: httpx.Client) -> list[str]:
        return [model["name"] for model in client.get("/v1/models").json()["models"]]

    paths, state = (bundles["towers"], bundles["dlrm"]), tmp_path / "state.json"
    with start(*paths, state_file=state) as client:
        assert client.post("/v2/repository/models/dlrm/unload").json()["durable"] is True
    with start(*paths, state_file=state) as client:
        assert names(client) == ["untrained"]
        assert client.post("/v2/repository/models/dlrm/load").status_code == 200
    with start(*paths, state_file=state) as client:
        assert names(client) == ["untrained", "dlrm"]


def test_what_cannot_be_restored_leaves_the_configured_version(
    start: Any, bundles: dict[str, Path], repository: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    for folder, words in (("version-1", "no longer holds"), ("../towers", "no longer holds"), ("gone", "no longer")):
        State({"untrained": Loaded(folder, "0" * 12)}).write(state)
        with start(bundles["towers"], repository=repository, state_file=state) as client:
            (model,) = client.get("/v1/models").json()["models"]
        assert model["version"] == BundleManifest.load(bundles["towers"]).version
        assert words in model["refused"]


def test_a_state_file_that_cannot_be_written_is_not_an_acknowledgement(
    start: Any, bundles: dict[str, Path], repository: Path, tmp_path: Path
) -> None:
    choose(repository, "version-1")
    with start(bundles["towers"], repository=repository, state_file=tmp_path / "no" / "state.json") as client:
        answer = client.post("/v2/repository/models/untrained/load")
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:lazydp:problem:not-remembered"


def test_a_state_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for text in ("", "[]", '{"format_version": 1}', '{"format_version": 99, "loaded": {}, "unloaded": []}'):
        path.write_text(text)
        with pytest.raises(FormatError, match=r"state\.json"):
            State.read(path)
