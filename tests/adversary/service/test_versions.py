"""Versions that are broken, hostile, half copied or changed in place, and a watch that ends."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from lazydp.components.bundle import inventory
from lazydp.components.bundle.signature import read_signing_key, sign
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.shared.errors import InputError, IntegrityError
from lazydp.service.http.metrics import Metrics
from lazydp.service.serving.registry import Registry
from lazydp.service.settings import load_settings
from support.service import running
from support.service_load import eventually, point
from support.signing_keys import make_keys


def model(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/v1/models").json()["models"][0]
    return found


def sealed(folder: Path, **manifest: Any) -> None:
    """Make the manifest list the files as they are now."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["files"] = [entry.model_dump() for entry in inventory.take(folder)]
    path.write_text(json.dumps(document | manifest))


def items(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def vandalise(folder: Path) -> None:
        table = pq.read_table(folder / "items.parquet")
        pq.write_table(change(table), folder / "items.parquet")
        sealed(folder)

    return vandalise


def column(name: str, values: Any) -> Callable[[Path], None]:
    return items(lambda table: table.set_column(table.column_names.index(name), name, pa.array(values)))


def weights(folder: Path) -> None:
    tensors = load_file(folder / "dense.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / "dense.safetensors")
    sealed(folder)


def counts(folder: Path) -> None:
    save_file({"popularity": torch.full((61,), float("nan"))}, folder / "popularity.safetensors")
    sealed(folder)


def layers(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    sealed(folder, model=document["model"] | {"user_widths": [1] * 100_000})


def many_files(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    entry = {"sha256": "0" * 64, "size": 0}
    files = [{"path": f"a{number % 30_000}", **entry} for number in range(60_000)]
    (folder / "manifest.json").write_text(json.dumps(document | {"files": files}))


def pipe(folder: Path) -> None:
    """Whoever opens it to read waits for ever."""
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def written(text: str) -> Callable[[Path], None]:
    def vandalise(folder: Path) -> None:
        (folder / "manifest.json").write_text(text)

    return vandalise


def vocabulary(values: list[Any]) -> Callable[[Path], None]:
    def vandalise(folder: Path) -> None:
        pq.write_table(pa.table({"value": pa.array(values)}), folder / "vocab" / "device.parquet")
        # By reference to the file, as long lists are.
        features = json.loads((folder / "manifest.json").read_text())["features"]
        features["features"][0]["vocabulary"] = {"kind": "declared", "size": 3, "sha256": "0" * 64}
        sealed(folder, features=features)

    return vandalise


def bomb(folder: Path) -> None:
    """A megabyte that unfolds to gigabytes: one long title, named by every item."""
    table = pq.read_table(folder / "items.parquet")
    titles = pa.DictionaryArray.from_arrays(pa.array([0] * table.num_rows, pa.int32()), pa.array(["x" * 30_000_000]))
    table = table.set_column(table.column_names.index("title"), "title", titles)
    pq.write_table(table, folder / "items.parquet", compression="zstd", store_schema=False)
    sealed(folder)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "ids that are integers": column("item", list(range(60))),
    "ids that are null": column("item", [None] * 60),
    "ids that are lists": column("item", [["a"]] * 60),
    "ids twice": column("item", ["a"] * 60),
    "titles that are numbers": column("title", np.zeros(60)),
    "a column twice": items(lambda table: table.append_column("title", table.column("title"))),
    "no ids": items(lambda table: table.drop_columns(["item"])),
    "weights that are no numbers": weights,
    "counts that are no numbers": counts,
    "100,000 layers": layers,
    "files listed twice": many_files,
    "a Parquet bomb": bomb,
    "a manifest that is a pipe": pipe,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a manifest of something else": written('{"format_version": 1}'),
    "a manifest nested deeply": written("[" * 100_000),
    "a vocabulary of integers": vocabulary([1, 2, 3]),
    "a vocabulary with nulls": vocabulary(["phone", None, "desktop"]),
    "a vocabulary of lists": vocabulary([["phone"], ["tablet"], ["desktop"]]),
    "a vocabulary of others": vocabulary(["phone", "tablet", "watch"]),
}


@pytest.fixture(scope="module")
def watched(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, httpx.Client]]:
    """A link, and a service that watches where it points: one for all hostile versions, one after another."""
    link = tmp_path_factory.mktemp("watched") / "current"
    link.symlink_to(bundles["popular"])
    with running(link, poll_s=0.05) as client:
        yield link, client


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_version_is_refused_and_the_next_good_one_served(
    watched: tuple[Path, httpx.Client], tmp_path: Path, case: str
) -> None:
    link, client = watched
    write_untrained(tmp_path / "bad", num_items=60, popularity=True, name="popular", seed=3)
    HOSTILE[case](tmp_path / "bad")
    # Another good version in each case, for the service has to change to it; it stays for the next case.
    seed = 4 + list(HOSTILE).index(case)
    good = link.with_name(f"good-{seed}")
    write_untrained(good, num_items=60, popularity=True, name="popular", seed=seed)
    assert model(client)["refused"] is None
    first = model(client)["version"]
    point(link, tmp_path / "bad")
    if (tmp_path / "bad" / "manifest.json").exists():
        eventually(lambda: model(client)["refused"] is not None)
    assert model(client)["version"] == first
    assert client.get("/v1/users/7/recommendations").status_code == 200
    point(link, good)
    eventually(lambda: model(client)["version"] != first)
    assert model(client)["refused"] is None


def test_only_signed_versions_are_served_where_that_is_demanded(bundles: dict[str, Path], tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    for name in ("towers", "newer"):
        shutil.copytree(bundles[name], tmp_path / name)
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "towers")
    demands: dict[str, Any] = {"poll_s": 0.05, "require_signature": [keys.public]}
    with pytest.raises(IntegrityError, match="is not signed"):
        Registry(load_settings(bundles=(link,), **demands), Metrics()).start()
    signer = read_signing_key(keys.private)
    sign(tmp_path / "towers", signer)
    with running(link, **demands) as client:
        first = model(client)["version"]
        point(link, tmp_path / "newer")
        eventually(lambda: "is not signed" in (model(client)["refused"] or ""))
        sign(tmp_path / "newer", read_signing_key(keys.other))
        eventually(lambda: "is signed by key" in model(client)["refused"])
        assert model(client)["version"] == first
        sign(tmp_path / "newer", signer)
        eventually(lambda: model(client)["version"] != first)


@pytest.mark.parametrize("lax", ["verify", "copy_bundles"])
def test_signatures_are_not_demanded_of_what_may_change(tmp_path: Path, lax: str) -> None:
    with pytest.raises(InputError, match="require_signature needs"):
        load_settings(None, require_signature=[tmp_path / "key"], **{lax: False})


def test_a_version_that_is_copied_slowly_is_served_once_it_is_whole(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "current"
    shutil.copytree(bundles["towers"], folder)
    with running(folder, poll_s=0.05) as client:
        first = model(client)["version"]
        # The manifest first, and nothing of it is touched again.
        names = sorted((bundles["newer"]).rglob("*"), key=lambda path: path.name != "manifest.json")
        for path in names:
            if path.is_file():
                shutil.copyfile(path, folder / path.relative_to(bundles["newer"]))
                if path.name == "manifest.json":
                    eventually(lambda: model(client)["refused"] is not None)
        eventually(lambda: model(client)["version"] != first)
        assert model(client)["refused"] is None


def test_a_bundle_may_be_destroyed_in_place_while_it_is_served(bundles: dict[str, Path], tmp_path: Path) -> None:
    # A mapped file that is cut short kills the process that reads it.
    folder = tmp_path / "current"
    shutil.copytree(bundles["towers"], folder)
    with running(folder, poll_s=0.05, copy_folder=tmp_path) as client:
        answer = client.get("/v1/users/9/recommendations").json()
        assert [path.name for path in tmp_path.iterdir()] == ["current"]
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".json":
                path.write_bytes(b"")
                os.truncate(path, 0)
        for user in range(50):
            assert client.get(f"/v1/users/{user}/recommendations").status_code == 200
        assert client.get("/v1/users/9/recommendations", params={"k": 10}).json() == answer


def test_a_watch_that_ends_begins_again_and_shows(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundles["towers"])
    watch = Registry.watch
    ends = iter([True, True])

    async def watch_that_ends(registry: Registry) -> None:
        if next(ends, False):
            raise ZeroDivisionError
        await watch(registry)

    monkeypatch.setattr(Registry, "watch", watch_that_ends)
    with running(link, poll_s=0.05) as client:
        eventually(lambda: "restarting" in client.get("/readyz").json()["background"].values())
        first = model(client)["version"]
        point(link, bundles["newer"])
        eventually(lambda: model(client)["version"] != first)
        assert set(client.get("/readyz").json()["background"].values()) == {"running"}
        assert 'lazydp_background_restarts_total{task="watch for versions"} 2.0' in client.get("/metrics").text
