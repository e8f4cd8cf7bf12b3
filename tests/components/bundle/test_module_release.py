"""The release of a module of one's own: written whole, checked when it is opened, refused with one clear reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.bundle.manifest import Lineage
from lazydp.components.bundle.module_release import ModuleManifest, load_module_release, write_module_release
from lazydp.components.shared.errors import (
    FormatError,
    InputError,
    IntegrityError,
    LazyDPError,
    NonFiniteError,
    NotPrivateError,
    PendingNoiseError,
)
from support.statements import stated

LINEAGE = Lineage(run_id="r", dataset="d" * 64, config="c" * 64, code_version="1", created="2026-01-01T00:00:00+00:00")


def statement(**changes: Any) -> PrivacyStatement:
    return stated(**{"steps": 7, **changes})


TEST_KEY = {"private": False, "epsilon": None, "test_key": True, "why_not_private": "a test key"}


def write(
    path: Path, weights: dict[str, torch.Tensor] | None = None, **changes: Any
) -> tuple[ModuleManifest, list[str]]:
    charged: list[str] = []
    given: dict[str, Any] = {
        "name": "m",
        "test_key": False,
        "step": 7,
        "weights": {"0.weight": torch.arange(6.0).reshape(3, 2)} if weights is None else weights,
        "flushed_steps": {"0": 7},
        "statement": statement(),
        "lineage": LINEAGE,
        "commit": charged.append,
        **changes,
    }
    return write_module_release(path, **given), charged


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    weights = {"a": shared.view(3, 2).t(), "b": shared, "c": torch.tensor([3], dtype=torch.int64)}
    manifest, charged = write(tmp_path / "m", weights)
    assert charged == [manifest.version]
    found = load_module_release(tmp_path / "m")
    assert found.manifest == manifest
    assert found.statement == statement()
    assert found.path == tmp_path / "m"
    assert {name: value.tolist() for name, value in found.weights.items()} == {
        name: value.tolist() for name, value in weights.items()
    }
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_equal_content_has_equal_versions_and_other_content_others(tmp_path: Path) -> None:
    versions = {
        "first": write(tmp_path / "first")[0].version,
        "again": write(tmp_path / "again")[0].version,
        "name": write(tmp_path / "name", name="n")[0].version,
        "step": write(tmp_path / "step", step=8, flushed_steps={"0": 8})[0].version,
        "statement": write(tmp_path / "statement", statement=statement(epsilon=2.5))[0].version,
        "weights": write(tmp_path / "weights", {"0.weight": torch.zeros(3, 2)})[0].version,
    }
    assert versions.pop("again") == versions["first"]
    assert len(set(versions.values())) == len(versions)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"flushed_steps": {"0": 7, "1": 6}}, PendingNoiseError),
        ({"flushed_steps": {"0": 8}}, PendingNoiseError),
        ({"weights": {"a": torch.tensor([1.0, float("nan")])}}, NonFiniteError),
        ({"weights": {"a": torch.tensor([float("inf"), 1.0])}}, NonFiniteError),
    ],
)
def test_nothing_is_charged_or_written_of_what_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[LazyDPError]
) -> None:
    charged: list[str] = []
    with pytest.raises(error):
        write(tmp_path / "m", **{**changes, "commit": charged.append})
    assert charged == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "m")
    with pytest.raises(InputError, match="already exists"):
        write(tmp_path / "m")


def test_a_charge_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    def refuse(version: str) -> None:
        raise InputError(version)

    with pytest.raises(InputError):
        write(tmp_path / "m", commit=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_model_under_a_test_key_is_opened_by_those_who_ask(tmp_path: Path) -> None:
    write(tmp_path / "m", test_key=True, statement=statement(**TEST_KEY))
    with pytest.raises(NotPrivateError, match="allow_test_key"):
        load_module_release(tmp_path / "m")
    assert load_module_release(tmp_path / "m", allow_test_key=True).manifest.test_key
    write(tmp_path / "private")
    assert not load_module_release(tmp_path / "private", allow_test_key=True).manifest.test_key


def rewritten(path: Path, **changes: Any) -> None:
    document = json.loads((path / "manifest.json").read_text())
    for name, value in changes.items():
        place = document["privacy"] if name.startswith("privacy_") else document
        place[name.removeprefix("privacy_")] = value
    (path / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": "bundle"}, FormatError),
        ({"test_key": True}, FormatError),
        ({"privacy_test_key": True}, FormatError),
        ({"test_key": True, "privacy_test_key": True}, FormatError),
        ({"flushed_steps": {"0": 6}}, PendingNoiseError),
        ({"step": 0}, FormatError),
        ({"files": []}, FormatError),
        ({"format_version": 99}, FormatError),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[LazyDPError]
) -> None:
    write(tmp_path / "m")
    rewritten(tmp_path / "m", **changes)
    with pytest.raises(error):
        load_module_release(tmp_path / "m", allow_test_key=True)


def test_damage_is_found_by_digest_or_by_size(tmp_path: Path) -> None:
    write(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        load_module_release(tmp_path / "m")
    load_module_release(tmp_path / "m", verify=False)
    file.write_bytes(content[:-1])
    with pytest.raises(IntegrityError):
        load_module_release(tmp_path / "m", verify=False)
