"""Bundles: written whole, opened only when everything about them holds."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lazydp.components.bundle import inventory
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.untrained import feature_spec, write_untrained
from lazydp.components.shared.errors import (
    FormatError,
    IntegrityError,
    LazyDPError,
    NotPrivateError,
    PendingNoiseError,
)
from lazydp.components.shared.files import sha256_file


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_untrained(tmp_path / "bundle", num_items=30, dim=8)
    return tmp_path / "bundle"


def opened(path: Path, **options: Any) -> Bundle:
    return Bundle.open(path, **{"allow_test_key": True, **options})


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest."""
    file = path / "manifest.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def vouch(path: Path) -> None:
    """Make the manifest agree with the files, as somebody would who means harm."""
    edit(path, lambda m: m.update(files=[entry.model_dump() for entry in inventory.take(path)]))


def refused(path: Path, kind: type[LazyDPError], *words: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        opened(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message


def test_what_was_written_is_read(bundle: Path) -> None:
    found = opened(bundle)
    assert found.manifest.name == "untrained"
    assert found.tables["item"].shape == (31, 8)
    assert found.items is not None
    assert found.items.ids[0] == "0"
    assert found.items.title(1) == "Title of item 0"
    assert found.items.metadata(1) == {"genre": "Action", "year": "1950"}
    assert found.statement.private is False
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_tables_are_mapped_not_read(bundle: Path) -> None:
    table = opened(bundle).tables["item"]
    assert table.untyped_storage().filename is not None or "item.safetensors" in Path("/proc/self/maps").read_text()


def test_equal_content_has_equal_versions(tmp_path: Path) -> None:
    versions = [write_untrained(tmp_path / str(n), num_items=30, seed=seed).version for n, seed in enumerate((0, 0, 1))]
    assert versions[0] == versions[1] != versions[2]


def test_a_folder_that_exists_is_not_written_over(bundle: Path) -> None:
    with pytest.raises(LazyDPError, match="already exists"):
        write_untrained(bundle)


def test_no_bundle(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", FormatError, "no bundle")
    refused(tmp_path, FormatError, "manifest")


@pytest.mark.parametrize("file", ["tables/item.safetensors", "dense.safetensors", "items.parquet"])
def test_a_corrupted_file(bundle: Path, file: str) -> None:
    data = bytearray((bundle / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / file).write_bytes(data)
    refused(bundle, IntegrityError, file, "corrupted")


def test_a_torn_file(bundle: Path) -> None:
    file = bundle / "tables" / "item.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(bundle, IntegrityError, "tables/item.safetensors", "bytes", verify=False)


def test_a_missing_and_an_extra_file(bundle: Path) -> None:
    (bundle / "extra").write_text("x")
    refused(bundle, IntegrityError, "extra", "not in the manifest")
    (bundle / "extra").unlink()
    (bundle / "items.parquet").unlink()
    refused(bundle, IntegrityError, "items.parquet", "missing")


def test_a_pending_row(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(step=3))
    refused(bundle, PendingNoiseError, "step 0 of 3", "pending")


def test_a_newer_format(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(format_version=99))
    refused(bundle, FormatError, "format_version 99", "newer lazydp")


def test_a_test_key(bundle: Path) -> None:
    refused(bundle, NotPrivateError, "noise key for tests", "--allow-test-key", allow_test_key=False)
    with pytest.raises(NotPrivateError):
        Bundle.open(bundle)


def test_without_privacy(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest.update(mode="sgd", test_key=False)
        manifest["privacy"]["test_key"] = False

    edit(bundle, change)
    refused(bundle, NotPrivateError, "without privacy", "--allow-non-private")
    with pytest.raises(NotPrivateError):
        Bundle.open(bundle)
    assert opened(bundle, allow_non_private=True).manifest.mode == "sgd"


def test_a_statement_that_claims_what_the_manifest_denies(bundle: Path) -> None:
    edit(bundle, lambda m: m["privacy"].update(private=True, epsilon=1.0))
    refused(bundle, FormatError, "privacy statement")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../outside",
        "tables/../../outside",
        "tables//item",
        ".hidden",
        "tables/.",
        "a\\b",
        "",
        "a\u0000b",
        "x" * 300,
    ],
)
def test_paths_that_lead_elsewhere(bundle: Path, path: str) -> None:
    edit(bundle, lambda m: m["files"][0].update(path=path))
    refused(bundle, FormatError, "files[0].path")
    edit(bundle, lambda m: (m["files"][0].update(path="dense.safetensors"), m["tables"][0].update(file=path)))
    refused(bundle, FormatError)


def test_links(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    shutil.move(bundle / "dense.safetensors", outside)
    (bundle / "dense.safetensors").symlink_to(outside)
    refused(bundle, FormatError, "symbolic link")
    (bundle / "dense.safetensors").unlink()
    shutil.move(outside, bundle / "dense.safetensors")
    (bundle / "more").symlink_to("/etc")
    refused(bundle, FormatError, "more", "symbolic link")


def test_a_link_to_the_bundle_is_a_pointer(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle)
    assert opened(tmp_path / "current").path == bundle.resolve()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["files"][0].update(size=-1), "size"),
        (lambda m: m["files"][0].update(size=10**30), "size"),
        (lambda m: m["files"][0].update(sha256="0"), "sha256"),
        (lambda m: m["files"].append(m["files"][0]), "twice"),
        (lambda m: m["tables"].append(m["tables"][0]), "twice"),
        (lambda m: m["tables"][0].update(num_rows=10**30), "num_rows"),
        (lambda m: m["tables"][0].update(num_rows=10**11), "table"),
        (lambda m: m["tables"][0].update(dim=0), "dim"),
        (lambda m: m["tables"][0].update(dtype="float16"), "dtype"),
        (lambda m: m["tables"].pop(), "table"),
        (lambda m: m["tables"][0].update(file="nothing.safetensors"), "nothing.safetensors"),
        (lambda m: m["model"].update(embedding_dim=10**9), ""),
        (lambda m: m["model"].update(embedding_dim=2**62), ""),
        (lambda m: m["model"].update(user_widths=[10**9, 10**9]), ""),
        (lambda m: m["model"].update(kind="other"), ""),
        (lambda m: m["model"].update(surprise=1), ""),
        (lambda m: m["features"]["item"]["vocabulary"].update(size=2**31 - 2), ""),
        (lambda m: m["features"].update(features=5), ""),
        (lambda m: m.update(name="../x"), "name"),
        (lambda m: m.update(step="many"), "step"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["privacy"].update(delta=2), "delta"),
        (lambda m: m.pop("privacy"), "privacy"),
        (lambda m: m.update(format_version="1"), "format_version"),
        (lambda m: m.pop("format_version"), "format_version"),
    ],
)
def test_a_hostile_manifest(bundle: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    edit(bundle, change)
    refused(bundle, LazyDPError, words)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"format_version": 1}', "\x00\xff"])
def test_a_manifest_that_is_none(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    refused(bundle, FormatError, "manifest")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(31, 8, dtype=torch.float64),
        torch.zeros(31, 8, dtype=torch.float16),
        torch.zeros(31, 9),
        torch.zeros(30, 8),
        torch.zeros(31 * 8),
        torch.full((31, 8), math.nan),
        torch.full((31, 8), math.inf),
    ],
)
def test_a_table_that_the_manifest_vouches_for_and_is_wrong(bundle: Path, tensor: torch.Tensor) -> None:
    save_file({"weight": tensor}, bundle / "tables" / "item.safetensors")
    vouch(bundle)
    refused(bundle, LazyDPError, "item")


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}" + b" " * 50]
)
def test_safetensors_that_are_none(bundle: Path, data: bytes) -> None:
    (bundle / "tables" / "item.safetensors").write_bytes(data)
    vouch(bundle)
    refused(bundle, FormatError, "item.safetensors")


def test_items_that_are_none(bundle: Path) -> None:
    (bundle / "items.parquet").write_bytes(b"PAR1 nothing PAR1")
    vouch(bundle)
    refused(bundle, FormatError, "items.parquet")


def test_items_of_another_catalogue(bundle: Path, tmp_path: Path) -> None:
    write_untrained(tmp_path / "other", num_items=31, dim=8)
    shutil.copy(tmp_path / "other" / "items.parquet", bundle / "items.parquet")
    vouch(bundle)
    refused(bundle, FormatError, "31 rows")


def test_the_writer_refuses_what_is_not_flushed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazydp.components.bundle import untrained

    whole = untrained.write_bundle  # type: ignore[attr-defined]
    monkeypatch.setattr(untrained, "write_bundle", lambda path, **given: whole(path, **{**given, "step": 1}))
    with pytest.raises(PendingNoiseError, match="flush before writing"):
        write_untrained(tmp_path / "pending")
    monkeypatch.setattr(
        untrained,
        "write_bundle",
        lambda path, **given: whole(
            path, **{**given, "table_weights": {n: w * math.nan for n, w in given["table_weights"].items()}}
        ),
    )
    with pytest.raises(LazyDPError, match="not finite"):
        write_untrained(tmp_path / "nan")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "counts of fewer items": ({"popularity": torch.zeros(30)}, "popularity"),
    "counts of more items": ({"popularity": torch.zeros(32)}, "popularity"),
    "counts of doubles": ({"popularity": torch.zeros(31, dtype=torch.float64)}, "popularity"),
    "no tables": ({"table_weights": {}}, "tables"),
    "tables without their steps": ({"flushed_steps": {}}, "tables"),
    "no items": ({"items": None}, "items"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_the_writer_refuses_what_belongs_to_another_model(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lazydp.components.bundle import untrained

    changes, says = FOREIGN[case]
    whole = untrained.write_bundle  # type: ignore[attr-defined]
    monkeypatch.setattr(untrained, "write_bundle", lambda path, **given: whole(path, **{**given, **changes}))
    with pytest.raises(ValueError, match=says):
        write_untrained(tmp_path / "foreign", num_items=30, popularity="counts" in case)
    assert list(tmp_path.iterdir()) == []


def test_digests_are_of_the_bytes(bundle: Path) -> None:
    for entry in opened(bundle).manifest.files:
        assert sha256_file(bundle / entry.path) == entry.sha256
        assert (bundle / entry.path).stat().st_mode & 0o777 == 0o644


def test_a_model_without_a_history(tmp_path: Path) -> None:
    spec = feature_spec(num_users=5, num_items=30, history=None, features=[])
    write_untrained(tmp_path / "plain", num_items=30, spec=spec)
    assert opened(tmp_path / "plain").spec.history is None
