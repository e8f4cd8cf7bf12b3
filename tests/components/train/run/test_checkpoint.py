"""Checkpoints are private, whole or absent, and go back to the same bits."""

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.shared.errors import InputError, IntegrityError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.background import BackgroundWriter
from lazydp.components.train.run.checkpoint import Checkpoint
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.identity import RunIdentity
from lazydp.kernels.noise_key import NoiseKey

CONFIG: dict[str, Any] = {
    "model": {"kind": "two_tower", "embedding_dim": 8},
    "privacy_unit": "example",
    "sampling_prob": 0.01,
    "expected_batch_size": 100,
    "steps": 50,
    "noise_multiplier": 1.0,
    "target_delta": 1e-5,
}
KEY = NoiseKey.for_tests(5)


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "tables": {"item": torch.randn(11, 4, generator=generator), "empty": torch.zeros(0, 4)},
        "last": {"item": torch.arange(11, dtype=torch.int32)},
        "transition": torch.randn(5, 4, generator=generator, dtype=torch.float64),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 0.1 + 0.2, "params": [0, 1]}]},
        "flag": torch.tensor([True, False]),
        "nothing": None,
        "name": "adam",
        "count": 2**60 + 1,
    }


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step=step, state=state(step), event={"kind": "none", "steps": step}, key=KEY)


def identity(**changes: Any) -> RunIdentity:
    return RunIdentity(
        run_id=changes.pop("run_id", "run-1"),
        config=TrainConfig.parse({**CONFIG, **changes.pop("config", {})}, where="test"),
        dataset_fingerprint=changes.pop("dataset", "abc"),
        code_version=changes.pop("version", "0.1.0"),
        noise_multiplier=1.0,
    )


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    else:
        assert ours == theirs


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        assert folder.latest() is None
        folder.save(checkpoint(3))
        found = folder.latest()
    assert found is not None
    assert found.step == 3
    assert found.event == {"kind": "none", "steps": 3}
    assert found.key is not None
    assert found.key.to_bytes() == KEY.to_bytes()
    assert found.key.is_test
    assert_equal(found.state, state(3))


def test_the_latest_two_are_kept_and_nobody_else_may_read_them(tmp_path: Path) -> None:
    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        folder.begin(identity())
        for step in (1, 2, 10):
            folder.save(checkpoint(step))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000000002", "step-000000010"]
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("state.safetensors", "noise.key", "checkpoint.json")
        for damage in ("truncate", "flip", "remove")
        if (name, damage) != ("noise.key", "remove")  # that is what export does
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        folder.save(checkpoint(1))
        folder.save(checkpoint(2))
        file = tmp_path / "run" / "checkpoints" / "step-000000002" / name
        content = bytearray(file.read_bytes())
        if damage == "remove":
            file.unlink()
        else:
            content[len(content) // 2] ^= 1
            file.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
        found = folder.latest()
        assert found is not None
        assert found.step == 1
        assert "damaged checkpoint" in caplog.text
        (tmp_path / "run" / "checkpoints" / "step-000000001" / "state.safetensors").write_bytes(b"")
        with pytest.raises(IntegrityError, match="no checkpoint of"):
            folder.latest()


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "run" / "checkpoints" / ".step-000000002.xyz"
    leftover.mkdir(parents=True)
    (leftover / "noise.key").write_bytes(KEY.to_bytes())
    with RunFolder.locked(tmp_path / "run") as folder:
        assert folder.latest() is None
    assert not leftover.exists()


def test_two_processes_never_hold_a_run(tmp_path: Path) -> None:
    with (
        RunFolder.locked(tmp_path / "run", create=True),
        pytest.raises(InputError, match="another process"),
        RunFolder.locked(tmp_path / "run"),
    ):
        pass
    with RunFolder.locked(tmp_path / "run"):
        pass


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run at"), RunFolder.locked(tmp_path / "absent"):
        pass


def test_identity_comes_back_and_differences_are_named(tmp_path: Path) -> None:
    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        assert folder.identity() is None
        folder.begin(identity())
        found = folder.identity()
    assert found == identity()
    assert found.differences(identity(config={"log_every": 3})) == []
    for changes, message in [
        ({"config": {"steps": 51}}, "steps: 51 != 50"),
        ({"run_id": "run-2"}, "run id: 'run-2' != 'run-1'"),
        ({"dataset": "xyz"}, "dataset: its content is another"),
        ({"version": "0.2.0"}, "lazydp version: '0.2.0' != '0.1.0'"),
    ]:
        assert found.differences(identity(**changes)) == [message]  # type: ignore[arg-type]


FOREIGN = [
    ({"run_id": "run-2"}, "run id: 'run-2' != 'run-1'"),
    ({"config": {"max_grad_norm": 2.0}}, "configuration: '"),
    ({"dataset": "xyz"}, "dataset: its content is another"),
    ({"version": "0.1.0+ffff"}, r"lazydp version: '0.1.0\+ffff' != '0.1.0'"),
    ({"config": {"log_every": 3}}, None),  # the control: what has no part in the result makes no other run
]


@pytest.mark.parametrize(("changes", "message"), FOREIGN)
def test_a_checkpoint_of_another_run_is_refused_whatever_its_shapes(
    changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    for name, of in (("ours", identity()), ("theirs", identity(**changes))):
        with RunFolder.locked(tmp_path / name, create=True) as folder:
            folder.begin(of)
            folder.save(checkpoint(1 if name == "ours" else 2))
    step = "step-000000002"
    shutil.copytree(tmp_path / "theirs" / "checkpoints" / step, tmp_path / "ours" / "checkpoints" / step)
    with RunFolder.locked(tmp_path / "ours") as folder:
        if message is None:
            found = folder.latest()
            assert found is not None
            assert found.step == 2
        else:
            with pytest.raises(IntegrityError, match=rf"of another run than .*run\.json \(.*\): {message}"):
                folder.latest()


def test_a_checkpoint_that_says_no_run_is_refused(tmp_path: Path) -> None:
    """As an older lazydp wrote them: which run such a one is of nobody can say."""
    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        folder.save(checkpoint(1))
        folder.begin(identity())
        with pytest.raises(IntegrityError, match="run id: None != 'run-1'"):
            folder.latest()


def test_destroyed_keys(tmp_path: Path) -> None:
    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        assert not folder.key_destroyed()
        folder.save(checkpoint(1))
        folder.save(checkpoint(2))
        kept_open = (tmp_path / "run" / "checkpoints" / "step-000000002" / "noise.key").open("rb")
        assert not folder.key_destroyed()
        folder.destroy_keys()
        assert folder.key_destroyed()
        found = folder.latest()
        assert found is not None
        assert found.key is None
    with kept_open:
        assert kept_open.read() == bytes(32), "removed, but not overwritten"


def test_the_background_writer_takes_the_state_as_it_was(tmp_path: Path) -> None:
    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        writer = BackgroundWriter(folder, memory_limit=1 << 30)
        moving = checkpoint(1)
        writer.save(moving)
        moving.state["tables"]["item"].zero_()
        writer.close()
        found = folder.latest()
    assert found is not None
    assert_equal(found.state, state(1))


def test_an_error_of_the_background_writer_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(checkpoint: Checkpoint, shards: None) -> None:
        raise OSError("no space left")

    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        monkeypatch.setattr(folder, "save", full)
        writer = BackgroundWriter(folder, memory_limit=1 << 30)
        writer.save(checkpoint(1))
        with pytest.raises(OSError, match="no space left"):
            writer.close()
        with pytest.raises(OSError, match="no space left"):
            BackgroundWriter(folder, memory_limit=0).save(checkpoint(2))


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with RunFolder.locked(tmp_path / "run", create=True) as folder:
        with pytest.raises(TypeError, match="state/x"):
            folder.save(Checkpoint(step=1, state={"x": {1, 2}}, event=None, key=KEY))
        assert folder.latest() is None
        assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
