"""Versions share requests by a key: in the shares asked for, always alike, and a swap of one moves nobody else."""

import asyncio
import collections
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.shared.errors import InputError
from lazydp.service.client import Client
from lazydp.service.http.metrics import Metrics
from lazydp.service.serving.shadow import Shadow
from lazydp.service.serving.split import Split
from support.service_load import eventually, point

KEYS = [f"user {number}" for number in range(100_000)]
RECOMMEND = "/v1/recommendations"


def dealt(weights: dict[str, float], *, salt: str = "a", among: Any = None) -> list[str | None]:
    split = Split(weights, salt=salt)
    return [split.choose(key, weights if among is None else among) for key in KEYS]


@pytest.mark.parametrize(
    "weights", [{"a": 90, "b": 10}, {"a": 0.5, "b": 0.25, "c": 0.25}, {"a": 999, "b": 1}, {"b": 1, "a": 1}]
)
def test_shares_are_the_weights_within_a_hundredth(weights: dict[str, float]) -> None:
    counts = collections.Counter(dealt(weights))
    for name, weight in weights.items():
        assert abs(counts[name] / len(KEYS) - weight / sum(weights.values())) < 0.01


def test_the_same_key_always_gets_the_same_version() -> None:
    assert dealt({"a": 90, "b": 10}) == dealt({"b": 10, "a": 90})
    # By definition of the hash, not of a process: a service that starts anew, or another beside it, deals alike.
    split = Split({"a": 60, "b": 40}, salt="lazydp")
    assert "".join(str(split.choose(str(key), ("a", "b"))) for key in range(20)) == "aaaaaaaabbaaabaaabab"


def test_a_change_of_weights_moves_no_more_than_its_share() -> None:
    before, after = dealt({"a": 90, "b": 10}), dealt({"a": 80, "b": 20})
    moved = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert set(moved) == {("a", "b")}
    assert abs(len(moved) / len(KEYS) - 0.1) < 0.01
    three = dealt({"a": 80, "b": 20, "c": 25})
    assert {other for one, other in zip(after, three, strict=True) if one != other} == {"c"}
    # Where one is not served, only its own keys go elsewhere.
    without = dealt({"a": 80, "b": 20, "c": 25}, among={"a", "b"})
    assert without == after


def test_another_salt_deals_anew() -> None:
    """A negative control too: half of an even split moves, which a hash that ignored its key would not do."""
    before, after = dealt({"a": 1, "b": 1}), dealt({"a": 1, "b": 1}, salt="b")
    moved = sum(one != other for one, other in zip(before, after, strict=True))
    assert abs(moved / len(KEYS) - 0.5) < 0.01


def test_without_a_key_the_heaviest_answers() -> None:
    split = Split({"a": 1, "b": 2}, salt="")
    assert split.choose(None, {"a", "b"}) == "b"
    assert split.choose(None, {"a"}) == "a"
    assert split.choose(None, ()) is None
    assert split.choose("x", ()) is None


@pytest.fixture
def links(bundles: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Two versions of one model, by the names they are served by."""
    for name, target in (("a", "towers"), ("b", "newer")):
        (tmp_path / name).symlink_to(bundles[target])
    return {name: tmp_path / name for name in ("a", "b")}


def versions(links: dict[str, Path]) -> dict[str, str]:
    return {name: BundleManifest.load(link).version for name, link in links.items()}


def test_a_service_deals_by_the_key_of_a_request(start: Any, links: dict[str, Path]) -> None:
    split = Split({"a": 60, "b": 40}, salt="lazydp")
    known = versions(links)
    with start(named_bundles=links, weights={"a": 60, "b": 40}, name="shop") as client:

        def model(**query: Any) -> dict[str, str]:
            found: dict[str, str] = client.post(RECOMMEND, json={"k": 2, **query}).json()["model"]
            return found

        names = [split.choose(str(user), links) for user in range(30)]
        assert set(names) == {"a", "b"}
        for user, name in enumerate(names):
            wanted = {"name": name, "version": known[str(name)]}
            for _ in range(2):
                assert model(user_id=user) == wanted
            assert model(split_key=user, history=["3"]) == model(split_key=str(user), user_id=7) == wanted
            assert client.get(f"/v1/users/{user}/recommendations").json()["model"] == wanted
            asked = {"split_key": str(user)}
            assert client.get("/v1/users/7/recommendations", params=asked).json()["model"] == wanted
            assert client.get("/v1/items/7/similar", params=asked).json()["model"] == wanted
        batch = client.post(RECOMMEND, json={"queries": [{"user_id": user} for user in range(30)]}).json()
        assert [result["model"]["name"] for result in batch["results"]] == names
        assert batch["model"] is None
        one = client.post(RECOMMEND, json={"queries": [{"user_id": 7, "split_key": 7}] * 3}).json()
        assert one["model"] == model(user_id=7)
        # Nobody is named, or a model is.
        assert model(history=["3"])["name"] == "a"
        assert client.post(RECOMMEND, params={"model": "b"}, json={"user_id": 7}).json()["model"]["name"] == "b"
        with Client(str(client.base_url)) as api:
            assert api.recommend_to_user("1", split_key="5").model.name == names[5]
        by_protocol(client, names, known)
        lines = client.get("/metrics").text
        assert 'lazydp_recommendations_total{model="b",source="user"}' in lines


def by_protocol(client: httpx.Client, names: list[str | None], known: dict[str, str]) -> None:
    """The service's own name is the split; a version below it is one of both."""
    path = "/v2/models/shop"
    assert client.get(path).json()["versions"] == [known["a"], known["b"]]
    for user, name in enumerate(names):
        tensor = {"name": "user_id", "shape": [1], "datatype": "BYTES", "data": [str(user)]}
        assert client.post(f"{path}/infer", json={"inputs": [tensor]}).json()["model_version"] == known[str(name)]
        asked = {"inputs": [{**tensor, "data": ["7"]}], "parameters": {"split_key": str(user)}}
        assert client.post(f"{path}/infer", json=asked).json()["model_version"] == known[str(name)]
    for name, version in known.items():
        answer = client.post(f"{path}/versions/{version}/infer", json={"inputs": [tensor]}).json()
        assert answer["model_version"] == version, name
        assert client.get(f"{path}/versions/{version}/ready").status_code == 200
    assert client.get(f"{path}/versions/0/ready").status_code == 404


def test_a_swap_under_load_moves_nobody_else(start: Any, bundles: dict[str, Path], links: dict[str, Path]) -> None:
    known = versions(links)
    answered: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
    failures: list[str] = []
    stop = threading.Event()
    with start(named_bundles=links, weights={"a": 60, "b": 40}, poll_s=0.02) as client:

        def ask() -> None:
            with httpx.Client(base_url=client.base_url, timeout=30) as own:
                number = 0
                while not stop.is_set():
                    number = (number + 1) % 40
                    response = own.post(RECOMMEND, json={"user_id": number, "k": 2})
                    if response.status_code != 200:
                        failures.append(response.text)
                        continue
                    model = response.json()["model"]
                    answered[str(number)].add((model["name"], model["version"]))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for target in ("towers", "newer") * 3:
                wanted = BundleManifest.load(bundles[target]).version
                point(links["b"], bundles[target])
                eventually(lambda wanted=wanted: served(client)["b"] == wanted)  # type: ignore[misc]
            eventually(lambda: len(answered) == 40)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert failures == []
    split = Split({"a": 60, "b": 40}, salt="lazydp")
    for number, models in answered.items():
        assert {name for name, _ in models} == {split.choose(number, links)}
    assert {pair for models in answered.values() for pair in models if pair[0] == "a"} == {("a", known["a"])}
    assert len({pair for models in answered.values() for pair in models if pair[0] == "b"}) == 2


def served(client: httpx.Client) -> dict[str, str]:
    return {model["name"]: model["version"] for model in client.get("/v1/models").json()["models"]}


def test_an_unloaded_version_leaves_its_keys_to_the_others(start: Any, links: dict[str, Path]) -> None:
    with start(named_bundles=links, weights={"a": 1, "b": 99}) as client:
        before = {user: client.post(RECOMMEND, json={"user_id": user}).json()["model"]["name"] for user in range(20)}
        assert "b" in before.values()
        assert client.post("/v2/repository/models/b/unload").status_code == 200
        for user in before:
            assert client.post(RECOMMEND, json={"user_id": user}).json()["model"]["name"] == "a"
        assert client.post("/v2/repository/models/b/load").status_code == 200
        again = {user: client.post(RECOMMEND, json={"user_id": user}).json()["model"]["name"] for user in range(20)}
        assert again == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"a": 1, "c": 1}}, "setting weights: nothing is served as 'c'"),
        ({"shadow": "c"}, "setting shadow: nothing is served as 'c'"),
        ({"weights": {"a": 0}}, "setting weights.a"),
        ({"named_bundles": {"../x": "y"}}, "setting named_bundles"),
    ],
)
def test_settings_that_cannot_hold_are_refused(
    start: Any, links: dict[str, Path], options: dict[str, Any], words: str
) -> None:
    from lazydp.service.http.metrics import Metrics
    from lazydp.service.serving.registry import Registry
    from lazydp.service.settings import load_settings

    with pytest.raises(InputError, match=words):
        Registry(load_settings(**{"named_bundles": links, "allow_test_key": True, **options}), Metrics()).start()


def copies(client: httpx.Client) -> dict[str, float]:
    """What became of copies, by outcome."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("lazydp_shadow_total{")]
    return {line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


def test_a_copy_of_every_request_goes_to_the_shadow(start: Any, links: dict[str, Path]) -> None:
    with start(named_bundles=links, shadow="b") as client:
        asked = [
            lambda: client.post(RECOMMEND, json={"user_id": 7}),
            lambda: client.post(RECOMMEND, json={"user_id": 7}),  # which the answers that are kept hold by now
            lambda: client.post(RECOMMEND, json={"queries": [{"user_id": 7}, {"user_id": 8}]}),
            lambda: client.get("/v1/users/7/recommendations"),
            lambda: client.get("/v1/items/7/similar"),
            lambda: client.post(RECOMMEND, params={"model": "a"}, json={"user_id": 7}),
        ]
        for ask in asked:
            assert '"name":"a"' in ask().text
        eventually(lambda: copies(client) == {"answered": 6.0})


class _Slow:
    """Ranks only once it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.ranked = 0

    def rank_here(self, query: Any) -> None:
        assert self.go.wait(60)
        self.ranked += 1
        if query == "bad":
            raise InputError("no such feature")


def test_a_slow_shadow_delays_nothing_and_drops_what_it_cannot_keep() -> None:
    async def scenario() -> None:
        metrics, slow = Metrics(), _Slow()
        shadow = Shadow("b", ranker=lambda: slow, places=4, metrics=metrics)  # type: ignore[arg-type, return-value]
        running = asyncio.create_task(shadow.run())
        await asyncio.sleep(0)
        shadow.copy("first")  # type: ignore[arg-type]
        while shadow._waiting.qsize():
            await asyncio.sleep(0.001)
        for number in range(1000):
            shadow.copy("bad" if number == 1 else str(number))  # type: ignore[arg-type]
        assert slow.ranked == 0
        slow.go.set()
        counted: dict[str, float] = {}
        while sum(counted.values()) < 1001:
            await asyncio.sleep(0.001)
            outcomes = ("answered", "dropped", "failed")
            counted = {outcome: metrics.shadow.labels("b", outcome)._value.get() for outcome in outcomes}
        assert counted == {"answered": 4.0, "dropped": 996.0, "failed": 1.0}
        running.cancel()
        shadow.close()

    asyncio.run(scenario())
