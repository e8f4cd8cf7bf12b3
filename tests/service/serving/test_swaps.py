"""A new version is swapped in whole, and a bad one changes nothing."""

import gc
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.bundle.untrained import write_untrained
from support.service_load import Load, eventually, point


def version(client: httpx.Client) -> str:
    found: str = client.get("/v1/models").json()["models"][0]["version"]
    return found


def swap_under_load(start: Any, bundles: dict[str, Path], folder: Path, *, swaps: int) -> tuple[Load, list[int]]:
    """Swap back and forth; returns the load and resident bytes after each swap."""
    link = folder / "current"
    link.symlink_to(bundles["towers"])
    versions = {path: BundleManifest.load(path).version for path in (bundles["towers"], bundles["newer"])}
    memory = []
    with start(link, poll_s=0.02) as client, Load(str(client.base_url)) as load:
        for number in range(swaps):
            target = bundles["newer"] if number % 2 == 0 else bundles["towers"]
            point(link, target)
            eventually(lambda target=target: version(client) == versions[target])  # type: ignore[misc]
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        load.until(51)
    return load, memory


def test_swaps_under_load_fail_no_request(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    load, _ = swap_under_load(start, bundles, tmp_path, swaps=10)
    assert load.failures == []
    assert len({key[0] for key in load.answers}) == 2


@pytest.mark.slow
def test_a_hundred_swaps_under_load_and_no_growth(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    load, memory = swap_under_load(start, bundles, tmp_path, swaps=100)
    assert load.failures == []
    settled, last = max(memory[20:40]), max(memory[80:])
    assert last - settled < 16 * 2**20, (settled, last)


def test_a_bad_version_is_refused_while_the_old_one_serves(
    start: Any, bundles: dict[str, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(bundles["newer"], bad)
    (bad / "dense.safetensors").write_bytes(b"nothing")
    other = tmp_path / "other"
    write_untrained(other, num_items=60, name="other")
    link = tmp_path / "current"
    link.symlink_to(bundles["towers"])
    with start(link, poll_s=0.02) as client:
        before = version(client)
        for target, words in ((bad, "dense.safetensors"), (other, "'other'")):
            point(link, target)
            eventually(lambda words=words: words in (client.get("/v1/models").json()["models"][0]["refused"] or ""))  # type: ignore[misc]
            assert version(client) == before
            assert client.get("/v1/users/7/recommendations").status_code == 200
            assert client.get("/readyz").status_code == 200
        assert 'outcome="refused"' in client.get("/metrics").text
        point(link, bundles["newer"])
        eventually(lambda: version(client) != before)
        assert client.get("/v1/models").json()["models"][0]["refused"] is None


def test_a_folder_written_anew_is_brought_in(start: Any, tmp_path: Path) -> None:
    write_untrained(tmp_path / "bundle", num_items=20)
    with start(tmp_path / "bundle", poll_s=0.02) as client:
        before = version(client)
        write_untrained(tmp_path / "bundle", num_items=20, seed=5, replace=True)
        eventually(lambda: version(client) != before)


def test_the_repository(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copytree(bundles["popular"], repository / "popular")
    shutil.copytree(bundles["newer"], repository / "untrained")
    (repository / "broken").mkdir()
    (repository / "outside").symlink_to(bundles["dlrm"])
    with start(bundles["towers"], repository=repository) as client:
        before = version(client)
        index = {part["name"]: part["state"] for part in client.post("/v2/repository/index").json()}
        assert index["untrained"] == "READY"
        assert index["popular"] == "UNAVAILABLE"
        assert client.get("/v2/models/popular/ready").status_code == 404
        assert client.post("/v2/repository/models/popular/load").status_code == 200
        assert client.get("/v2/models/popular/ready").status_code == 200
        loaded = client.post("/v2/repository/models/untrained/load").json()
        assert loaded["version"] != before
        assert version(client) == loaded["version"]
        for name in ("outside", "..", "%2e%2e", "broken", "nothing", ".", "repository"):
            assert client.post(f"/v2/repository/models/{name}/load").status_code in (404, 405, 422), name
        assert len(client.get("/v1/models").json()["models"]) == 2
        assert client.post("/v2/repository/models/popular/unload").status_code == 200
        assert client.get("/v2/models/popular/ready").status_code == 404
        assert client.get("/v1/users/7/recommendations").status_code == 200


def test_old_versions_are_let_go(start: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    link = tmp_path / "current"
    # A copy of its own: servers of other tests in this process may still map the shared one.
    old = tmp_path / "old"
    shutil.copytree(bundles["towers"], old)
    link.symlink_to(old)
    with start(link, poll_s=0.02) as client:
        before = version(client)
        client.get("/v1/users/7/recommendations")
        point(link, bundles["newer"])
        eventually(lambda: version(client) != before)
        client.get("/v1/users/7/recommendations")
        mapped = f"{old}{os.sep}"
        # Collected first: what only a cycle still holds is let go as well, at a time of the collector's choosing.
        eventually(lambda: gc.collect() >= 0 and mapped not in _mapped_by(client))


def _mapped_by(_: httpx.Client) -> str:
    import gc

    gc.collect()
    return Path("/proc/self/maps").read_text()
