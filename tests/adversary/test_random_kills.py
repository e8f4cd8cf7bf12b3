"""`kill -9` of train, export, serve and the pipeline at a hundred random moments, on a machine that is busy meanwhile.

After each kill: every entry that the ledger had before is still there, the latest complete checkpoint is no older, what
is released is charged, and no private file can be read by others. At the end everything is charged once.
`kills.py` runs one kind so many times, and prints a table of where the processes were killed.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from adversary.kills import KILLS, Kills

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.storage.entries import Entry
from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.train.run.folder import RunFolder
from support.forks import LAZYDP, NOWHERE, Fork
from support.service import running
from support.service_load import Load, point
from support.service_process import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> Kills:
    """How often to kill, and where to note it."""
    return request.config.stash.get(KILLS, Kills())


@pytest.fixture
def busy(bundles: dict[str, Path]) -> Iterator[None]:
    """Clients that ask a service all the time, in this process; every answer must be right."""
    with running(bundles["towers"]) as client, Load(str(client.base_url)) as load:
        yield
    assert load.failures == []


def readable_by_others(folder: Path) -> list[Path]:
    """Files below `folder` that another user of the machine can reach and read."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            found += readable_by_others(path) if mode & stat.S_IXOTH else []
        elif stat.S_ISREG(mode) and mode & stat.S_IROTH:
            found.append(path)
    return found


def test_the_check_of_permissions_sees_what_is_open(tmp_path: Path) -> None:
    for name, mode in (("closed", 0o700), ("open", 0o755)):
        (tmp_path / name).mkdir(mode=mode)
        (tmp_path / name / "readable").touch(mode=0o644)
        (tmp_path / name / "private").touch(mode=0o600)
    assert readable_by_others(tmp_path) == [tmp_path / "open" / "readable"]


def entries_of(url: str) -> tuple[Entry, ...]:
    with Ledger.open(url, read_only=True) as ledger:
        entries = tuple(ledger.entries())
    assert verify(entries).problems == ()
    return entries


class Release:
    """`lazydp train` and `lazydp export` of one run, each killed until it ends by itself."""

    def __init__(self, folder: Path, dataset: Path, config: Path, url: str, kills: Kills) -> None:
        folder.mkdir()
        self.run, self.bundle, self.folder = folder / "run", folder / "bundle", folder
        self._url = url
        self._kills = kills
        given = ["--dataset", str(dataset), "--ledger", url]
        self._train = ["train", *given, "--config", str(config), "--out", str(self.run), "--resume"]
        self._export = ["export", *given, "--run", str(self.run), "--out", str(self.bundle)]

    def undisturbed(self) -> tuple[float, float]:
        """Seconds that each command takes."""
        took = []
        for command in (self._train, self._export):
            begun = time.monotonic()
            assert Fork(LAZYDP, *command, output=(NOWHERE, NOWHERE)).wait() == 0
            took.append(time.monotonic() - begun)
        return took[0], took[1]

    def killed(self, took: tuple[float, float]) -> None:
        """Do both, under kills."""
        self._until_it_ends(self._train, took[0], self._after_train)
        assert not self.bundle.exists()
        self._until_it_ends(self._export, took[1], self._after_export)
        assert Bundle.open(self.bundle).statement.private
        assert not list(self.run.rglob("noise.key"))
        assert [path.name for path in self.folder.iterdir() if path.name.startswith(".")] == []
        assert self._kinds() == ["reserved", "committed"]

    def _until_it_ends(self, command: list[str], took: float, check: Callable[[], None]) -> None:
        while True:
            before, step = entries_of(self._url), self._latest()
            process = Fork(LAZYDP, *command, output=(NOWHERE, NOWHERE))
            moment = time.monotonic() + self._kills.chance.uniform(0, 1.2 * took)
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.002)
            process.kill()
            status = process.wait()
            assert status in (0, -signal.SIGKILL)
            assert entries_of(self._url)[: len(before)] == before
            assert self._latest() >= step
            self._check_permissions()
            check()
            if status == 0:
                return
            far = f"step {step}" if command is self._train else f"bundle: {self.bundle.exists()}"
            self._kills.note(command[0], far)

    def _latest(self) -> int:
        if not self.run.is_dir():
            return -1
        with RunFolder.locked(self.run) as folder:
            found = folder.latest()
        return -1 if found is None else found.step

    def _check_permissions(self) -> None:
        found = readable_by_others(self.folder)
        assert [path for path in found if not path.is_relative_to(self.bundle)] == []

    def _kinds(self) -> list[str]:
        run_id = BundleManifest.load(self.bundle).lineage.run_id
        return [entry.kind for entry in entries_of(self._url) if entry.run_id == run_id]

    def _after_train(self) -> None:
        assert not self.bundle.exists()

    def _after_export(self) -> None:
        if self.bundle.exists():
            assert self._kinds() == ["reserved", "committed"]
            assert not list(self.run.rglob("noise.key"))


def test_train_and_export(tiny: Any, tmp_path: Path, kills: Kills, busy: None) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(tiny.config(steps=24, checkpoint_every=3).model_dump(mode="json")))
    url, made = tiny.ledger(epsilon=1e6), 0
    # The first fork waits for the imports of the server of forks, so the second release is measured.
    Release(tmp_path / "first", tiny.dataset, config, url, kills).undisturbed()
    took = Release(tmp_path / "undisturbed", tiny.dataset, config, url, kills).undisturbed()
    while kills.noted.total() < kills.wanted(76):
        Release(tmp_path / f"release-{made}", tiny.dataset, config, url, kills).killed(took)
        made += 1
    kinds = [entry.kind for entry in entries_of(url)]
    assert kinds.count("reserved") == kinds.count("committed") == made + 2
    assert "voided" not in kinds


def test_serve(tmp_path: Path, kills: Kills, busy: None) -> None:
    """A load is acknowledged and remembered, or not acknowledged and one of the two versions served."""
    for seed, name in enumerate(("first", "second")):
        write_untrained(tmp_path / name, num_items=60, seed=seed)
    versions = {name: BundleManifest.load(tmp_path / name).version for name in ("first", "second")}
    state = tmp_path / "state.json"
    service = Process(tmp_path / "first", repository=tmp_path, state_file=state)
    acknowledged = "first"
    service.wait_until_ready()
    with Load(service.url, retrying=True) as load:
        for number in range(kills.wanted(16)):
            asked = ("second", "first")[number % 2]
            point(tmp_path / "untrained", asked)
            told: list[str] = []
            asking = threading.Thread(target=_load, args=(service.url, told))
            asking.start()
            time.sleep(kills.chance.uniform(0, 0.5))
            service.stop(signal.SIGKILL)
            asking.join()
            service.start()
            service.wait_until_ready()
            found = service.version()
            kills.note("serve", "load acknowledged" if told else "load not acknowledged")
            assert found == versions[asked] if told else found in (versions[asked], versions[acknowledged])
            acknowledged = next(name for name, version in versions.items() if version == found)
    service.stop(signal.SIGKILL)
    assert load.failures == []
    assert load.retried


def _load(url: str, told: list[str]) -> None:
    try:
        answer = httpx.post(f"{url}/v2/repository/models/untrained/load", timeout=60)
    except httpx.TransportError:
        return
    assert answer.json()["durable"] is True
    told.append(answer.json()["version"])


def pipeline(folder: Path, sample: Path, url: str) -> subprocess.Popen[bytes]:
    data = ["--input", str(sample / "interactions.parquet"), "--spec", str(sample / "spec.yaml")]
    words = ["pipeline", "run", *data, "--config", str(sample / "train.yaml"), "--out", str(folder), "--budget-epsilon"]
    return subprocess.Popen(
        [sys.executable, "-c", "from lazydp.pipelines.cli import main; main()", *words, "1000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "LAZYDP_LEDGER": url},
    )


def wait_for_group(group: int) -> None:
    """Wait until no process of a group is left: tasks whose pipeline was killed alone go on to their end."""
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def test_pipeline(tmp_path: Path, kills: Kills, busy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole tree of processes killed, or the program that runs it alone; then a run to the end."""
    from click.testing import CliRunner

    from lazydp.pipelines.cli import cli

    sample, url = tmp_path / "sample", f"sqlite:///{tmp_path / 'ledger.db'}"
    sampled = CliRunner().invoke(
        cli, ["sample-data", "--out", str(sample), "--users", "60", "--items", "400", "--interactions", "3000"]
    )
    assert sampled.exit_code == 0, sampled.output
    spec = sample / "spec.yaml"
    spec.write_text(spec.read_text().replace("max_examples_per_user: 64", "max_examples_per_user: 4"))
    settings = {"model": {"kind": "two_tower", "embedding_dim": 8}, "privacy_unit": "example", "sampling_prob": 0.02}
    settings |= {"expected_batch_size": 64, "steps": 10, "noise_multiplier": 1.0, "target_delta": 1e-5, "negatives": 2}
    (sample / "train.yaml").write_text(yaml.safe_dump({**settings, "embeddings": {"learning_rate": 1.0}}))
    begun = time.monotonic()
    assert pipeline(tmp_path / "whole", sample, url).wait() == 0
    took = time.monotonic() - begun
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o755)
    monkeypatch.setenv("TMPDIR", str(scratch))
    number = 0
    while kills.noted.total() < kills.wanted(8):
        number += 1
        before, out = entries_of(url), tmp_path / f"out-{number}"
        process = pipeline(out, sample, url)
        time.sleep(kills.chance.uniform(0.1, 1) * took)
        ended = process.poll() is not None
        if number % 2:
            process.kill()
        elif not ended:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_for_group(process.pid)
        after = entries_of(url)
        assert after[: len(before)] == before
        tasks = sorted(task.name for task in out.glob("artifacts/*/*"))
        what = "the program that runs it" if number % 2 else "all of its processes"
        if not ended:
            kills.note(f"pipeline, {what}", f"begun: {', '.join(tasks) or 'no task'}")
        assert not out.exists() or stat.S_IMODE(out.stat().st_mode) == 0o700
        assert readable_by_others(scratch) == []
        of_runs = [(entry.run_id, entry.kind) for entry in after if entry.run_id]
        assert len(set(of_runs)) == len(of_runs), "charged twice"
        for manifest in out.rglob("manifest.json"):
            run_id = BundleManifest.load(manifest.parent).lineage.run_id
            assert (run_id, "committed") in of_runs, "released without a charge"
    assert pipeline(tmp_path / "out-again", sample, url).wait() == 0
    assert Bundle.open(tmp_path / "out-again" / "bundle").statement.private
