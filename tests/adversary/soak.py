"""A service under load and attack for minutes: `make soak`, or `python tests/adversary/soak.py --seconds 600`.

Two services on loopback answer clients with a key all the time. The *steady* one is never killed: its versions are
swapped, bad versions are put in its way, its ledger goes away or is locked, and clients without a key flood it, hold
connections and desert it. The *killed* one is killed by SIGKILL and started again, between loads that it acknowledged.
At the end the figures of docs/reliability.md are printed; the status is 1 where one of them is not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.bundle.untrained import write_untrained
from lazydp.service.http.auth import make_key
from support.floods import FLOODS, POST
from support.service_load import point
from support.service_process import Process

CONNECTIONS = 200
SHARE = CONNECTIONS // 2
# Of what one address may hold beside its share, health alone is answered.
RESERVE = 8
MUCH = 32 * 2**20
MOST_RAISED = 64 * 2**20
MOST_GROWTH = 8 * 2**20
WARM_UP = 0.3
# Of the answers of one version to one question, the last bits of a score may differ with what it is ranked beside.
CLOSE = 1e-5


@dataclass
class Figures:
    """What was seen. Threads share it."""

    requests: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    asked_again: int = 0
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    server_errors: list[str] = field(default_factory=list)
    raised: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def growth(self) -> int:
        """Bytes by which the median memory of the last third exceeds that of the first third after the warm-up."""
        begin, end = self.memory[0][0], self.memory[-1][0]
        warm = begin + WARM_UP * (end - begin)
        third = (end - warm) / 3
        first = sorted(rss for at, rss in self.memory if warm <= at < warm + third)
        last = sorted(rss for at, rss in self.memory if at >= end - third)
        return last[len(last) // 2] - first[len(first) // 2]

    def problems(self) -> list[str]:
        """Which figures are not as they must be."""
        found = [f"{len(what)} {name}, such as {what[0]}" for name, what in self._must_be_empty().items() if what]
        if max(self.raised, default=0) > MOST_RAISED:
            found.append(f"clients without a key raised the memory by {max(self.raised)} bytes")
        if max(self.held, default=0) > SHARE + RESERVE:
            found.append(f"one address held {max(self.held)} connections")
        if self.growth() > MOST_GROWTH:
            found.append(f"memory grew by {self.growth()} bytes after the warm-up")
        return found

    def _must_be_empty(self) -> dict[str, list[str]]:
        return {
            "answers lost": self.lost,
            "answers mixed": self.mixed,
            "answers 5xx": self.server_errors,
            "loads forgotten": self.forgotten,
        }

    def document(self) -> dict[str, Any]:
        """For a person to read."""
        mib = 2**20
        return {
            "requests answered": dict(self.requests) | {"all": self.requests.total()},
            "faults injected": dict(self.faults) | {"all": self.faults.total()},
            "requests asked again after a kill": self.asked_again,
            **{name: len(what) for name, what in self._must_be_empty().items()},
            "most MiB raised by clients without a key": round(max(self.raised, default=0) / mib, 1),
            "most connections held by one address": max(self.held, default=0),
            "MiB of memory after the warm-up": round(self.memory[int(WARM_UP * len(self.memory))][1] / mib, 1),
            "MiB of growth after the warm-up": round(self.growth() / mib, 2),
        }


def memory_of(process: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Asker:
    """A client with a key that asks all kinds of questions, and compares what one version says to one question."""

    def __init__(
        self, url: str, key: str, figures: Figures, answers: dict[Any, Any], *, is_killed: bool, seed: int
    ) -> None:
        self._client = httpx.Client(base_url=url, timeout=60, headers={"x-api-key": key})
        self._figures = figures
        self._answers = answers
        self._is_killed = is_killed
        self._chance = random.Random(seed)

    def ask_until(self, over: threading.Event) -> None:
        """Ask, one question after the other."""
        questions = [self._one, self._several, self._by_path, self._similar, self._infer, self._budget, self._page]
        with self._client:
            while not over.is_set():
                self._chance.choice(questions)()
                time.sleep(0.005)

    def _answer(self, kind: str, method: str, path: str, **options: Any) -> Any:
        """Ask until there is an answer: a client of the killed service asks again when its connection fails."""
        deadline = time.monotonic() + 120
        while True:
            try:
                response = self._client.request(method, path, **options)
                break
            except httpx.TransportError as error:
                if not self._is_killed or time.monotonic() > deadline:
                    self._figures.lost.append(f"{kind}: {error!r}")
                    return None
                with self._figures.lock:
                    self._figures.asked_again += 1
                time.sleep(0.05)
        if response.status_code != httpx.codes.OK:
            where = self._figures.server_errors if response.status_code >= 500 else self._figures.lost
            where.append(f"{kind}: {response.status_code} {response.text[:200]}")
            return None
        with self._figures.lock:
            self._figures.requests[kind] += 1
        return response

    def _same(self, version: str, question: tuple[Any, ...], items: list[dict[str, Any]]) -> None:
        found = [(item["id"], item["score"]) for item in items]
        with self._figures.lock:
            known = self._answers.setdefault((version, *question), found)
        alike = len(known) == len(found) and all(
            a[0] == b[0] and abs(a[1] - b[1]) <= CLOSE * max(1.0, abs(a[1])) for a, b in zip(known, found, strict=True)
        )
        if not alike:
            self._figures.mixed.append(f"{question} of {version}: {known} and {found}")

    def _one(self) -> None:
        user = str(self._chance.randrange(20))
        response = self._answer("recommendations", "POST", "/v1/recommendations", json={"user_id": user, "k": 5})
        if response is not None:
            answer = response.json()
            self._same(answer["model"]["version"], ("user", user), answer["items"])

    def _several(self) -> None:
        users = [str(self._chance.randrange(20)) for _ in range(4)]
        queries = {"queries": [{"user_id": user, "k": 5} for user in users]}
        response = self._answer("batches", "POST", "/v1/recommendations", json=queries)
        if response is not None:
            answer = response.json()
            for user, result in zip(users, answer["results"], strict=True):
                self._same(answer["model"]["version"], ("user", user), result["items"])

    def _by_path(self) -> None:
        user = str(self._chance.randrange(20))
        response = self._answer("users by path", "GET", f"/v1/users/{user}/recommendations", params={"k": 5})
        if response is not None:
            answer = response.json()
            self._same(answer["model"]["version"], ("user", user), answer["items"])

    def _similar(self) -> None:
        item = str(self._chance.randrange(20))
        response = self._answer("similar items", "GET", f"/v1/items/{item}/similar", params={"k": 5})
        if response is not None:
            answer = response.json()
            self._same(answer["model"]["version"], ("item", item), answer["items"])

    def _infer(self) -> None:
        users = [str(self._chance.randrange(20)) for _ in range(3)]
        tensor = {"name": "user_id", "datatype": "BYTES", "shape": [3], "data": users}
        body = {"inputs": [tensor], "parameters": {"k": 5}}
        response = self._answer("inference", "POST", "/v2/models/untrained/infer", json=body)
        if response is not None:
            answer = response.json()
            tensors = {output["name"]: output["data"] for output in answer["outputs"]}
            for row, user in enumerate(users):
                page = slice(5 * row, 5 * row + 5)
                pairs = zip(tensors["item_id"][page], tensors["score"][page], strict=True)
                items = [{"id": item, "score": score} for item, score in pairs]
                self._same(answer["model_version"], ("user", user), items)

    def _budget(self) -> None:
        response = self._answer("budgets", "GET", "/v1/privacy/budget")
        if response is not None and response.json()["source"] not in ("ledger", "statement"):
            self._figures.mixed.append(response.text[:200])

    def _page(self) -> None:
        self._answer("pages", "GET", "/")


class Steady:
    """The service that is never killed, and what is done to it."""

    def __init__(self, folder: Path, service: Process, key: str, figures: Figures, *, seed: int) -> None:
        self.folder = folder
        self._key = key
        self._service = service
        self._figures = figures
        self._chance = random.Random(seed)
        self._versions = itertools.cycle(["second", "first"])
        self._floods = itertools.cycle(FLOODS.items())
        self._addresses = itertools.cycle(f"127.0.0.{last}" for last in range(2, 200))

    def torment_until(self, over: threading.Event) -> None:
        """One fault after the other, each kind in turn."""
        faults: dict[str, Callable[[], object]] = {
            "version swapped": self._swap,
            "flood without a key": self._flood,
            "bad version": self._bad_version,
            "connections held without a key": self._hold,
            "ledger gone": self._ledger_gone,
            "clients that desert": self._desert,
            "ledger locked": self._ledger_locked,
            "bundle destroyed in place": self._destroy,
        }
        for name, fault in itertools.cycle(faults.items()):
            if over.wait(self._chance.uniform(0.2, 1.0)):
                return
            fault()
            with self._figures.lock:
                self._figures.faults[name] += 1

    def _swap(self) -> None:
        point(self.folder / "current", self.folder / next(self._versions))

    def _bad_version(self) -> None:
        served = (self.folder / "current").readlink()
        point(self.folder / "current", self.folder / "bad")
        time.sleep(0.5)
        point(self.folder / "current", served)

    def _destroy(self) -> None:
        """Cut the files of a copy that is served; then serve whole ones again."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "first", copy)
        point(self.folder / "current", copy)
        time.sleep(1)
        for path in copy.rglob("*.safetensors"):
            os.truncate(path, 0)
        time.sleep(0.5)
        point(self.folder / "current", self.folder / "first")

    def _ledger_gone(self) -> None:
        ledger, away = self.folder / "ledger", self.folder / "ledger-away"
        ledger.rename(away)
        time.sleep(2)
        away.rename(ledger)

    def _ledger_locked(self) -> None:
        with contextlib.closing(sqlite3.connect(self.folder / "ledger" / "ledger.db", isolation_level=None)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            time.sleep(2)
            holder.execute("ROLLBACK")

    def _connect(self, address: str) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self._service.port), timeout=20, source_address=(address, 0))
        made.settimeout(20)
        return made

    def _raised(self, attack: Callable[[str], None]) -> None:
        """Attack, and note by how much the service's memory rose meanwhile."""
        before = most = memory_of(self._service.process.pid)
        attacker = threading.Thread(target=attack, args=(next(self._addresses),))
        attacker.start()
        while attacker.is_alive():
            attacker.join(0.02)
            most = max(most, memory_of(self._service.process.pid))
        self._figures.raised.append(most - before)

    def _flood(self) -> None:
        _, flood = next(self._floods)

        def attack(address: str) -> None:
            with contextlib.suppress(OSError), self._connect(address) as connection:
                sent = 0
                for part in itertools.chain([flood.head], itertools.repeat(flood.piece)):
                    connection.sendall(part)
                    sent += len(part)
                    if sent > MUCH:
                        self._figures.lost.append(f"{sent} bytes of a flood were taken")
                        return

        self._raised(attack)

    def _hold(self) -> None:
        """Open more connections than one address may, and let the service count those that it holds."""
        before = most = self._connections()
        held = threading.Event()

        def attack(address: str) -> None:
            with contextlib.ExitStack() as open_:
                for _ in range(CONNECTIONS):
                    with contextlib.suppress(OSError):
                        connection = open_.enter_context(self._connect(address))
                        connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
                held.wait()

        attacker = threading.Thread(target=self._raised, args=(attack,))
        attacker.start()
        for _ in range(10):
            most = max(most, self._connections())
            time.sleep(0.2)
        held.set()
        attacker.join()
        self._figures.held.append(most - before)

    def _connections(self) -> int:
        text = httpx.get(f"{self._service.url}/metrics", headers={"x-api-key": self._key}, timeout=60).text
        return int(float(text.partition("\nlazydp_connections ")[2].partition("\n")[0]))

    def _desert(self) -> None:
        address = next(self._addresses)
        for _ in range(20):
            with contextlib.suppress(OSError):
                connection = self._connect(address)
                connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()


def kill_until(over: threading.Event, service: Process, repository: Path, key: str, figures: Figures) -> None:
    """Load a version, kill at a random moment, start again, and look whether what was acknowledged is served."""
    chance = random.Random(0)
    versions = itertools.cycle(["first", "second"])
    headers = {"x-api-key": key}
    while not over.wait(chance.uniform(2, 8)):
        name = next(versions)
        point(repository / "untrained", repository / name)
        answer = httpx.post(f"{service.url}/v2/repository/models/untrained/load", headers=headers, timeout=120)
        expected = BundleManifest.load(repository / name).version
        if answer.json() != {"name": "untrained", "version": expected, "durable": True}:
            figures.server_errors.append(answer.text)
        time.sleep(chance.uniform(0, 2))
        service.stop(signal.SIGKILL)
        service.start()
        service.wait_until_ready()
        found = httpx.get(f"{service.url}/v1/models", headers=headers, timeout=60).json()["models"][0]["version"]
        if found != expected:
            figures.forgotten.append(f"{expected}, found {found}")
        with figures.lock:
            figures.faults["service killed"] += 1


def prepare(folder: Path) -> str:
    """Versions, a bad one and a ledger; returns the ledger's URL."""
    for number, name in enumerate(("first", "second")):
        write_untrained(folder / name, num_items=200, seed=number)
    shutil.copytree(folder / "second", folder / "bad")
    (folder / "bad" / "dense.safetensors").write_bytes(b"nothing")
    (folder / "current").symlink_to(folder / "first")
    (folder / "ledger").mkdir()
    url = f"sqlite:///{folder / 'ledger' / 'ledger.db'}"
    with Ledger.open(url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        ledger.set_budget("shop", epsilon=3.0, delta=1e-5)
        event = dpsgd_event(noise_multiplier=10.0, sampling_prob=1.0, steps=1)
        ledger.reserve(dataset="shop", event=event, run_id="one")
    return url


def soak(seconds: float, folder: Path) -> Figures:
    """Load, attack and kill two services for so long."""
    figures = Figures()
    url = prepare(folder)
    key, digest = make_key()
    scopes = ["recommend", "budget", "metrics", "admin"]
    keys = json.dumps([{"name": "soak", "sha256": digest, "scopes": scopes}])
    common = {"api_keys": keys, "ledger": url, "poll_s": 0.2, "max_connections": CONNECTIONS, "log_level": "error"}
    state = folder / "state.json"
    steady = Process(folder / "current", **common)
    killed = Process(folder / "first", **common, repository=folder, state_file=state)
    over = threading.Event()
    answers: dict[Any, Any] = {}
    threads: list[threading.Thread] = []
    try:
        for service in (steady, killed):
            service.wait_until_ready()
        for service, seed in itertools.product((steady, killed), range(3)):
            asker = Asker(service.url, key, figures, answers, is_killed=service is killed, seed=seed)
            threads.append(threading.Thread(target=asker.ask_until, args=(over,)))
        victim = Steady(folder, steady, key, figures, seed=1)
        threads.append(threading.Thread(target=victim.torment_until, args=(over,)))
        threads.append(threading.Thread(target=kill_until, args=(over, killed, folder, key, figures)))
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        while time.monotonic() - begun < seconds and all(thread.is_alive() for thread in threads):
            time.sleep(0.5)
            figures.memory.append((time.monotonic(), memory_of(steady.process.pid)))
        if time.monotonic() - begun < seconds:
            figures.lost.append("a thread of the soak ended early: its traceback is above")
    finally:
        over.set()
        for thread in threads:
            thread.join()
        for service in (steady, killed):
            service.process.kill()
            service.process.wait()
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(description="A service under load and attack.")
    parser.add_argument("--seconds", type=float, default=600)
    given = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lazydp-soak-") as folder:
        os.environ["LAZYDP_CACHE"] = str(Path(folder) / "cache")
        figures = soak(given.seconds, Path(folder))
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, load before {load_before:.1f}"
    print(json.dumps({"seconds": given.seconds, "machine": machine, **figures.document()}, indent=2))
    problems = figures.problems()
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
