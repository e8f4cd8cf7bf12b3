"""A run that several ranks train: one charge, one set of checkpoints, and the bits of one process."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.components.audit.audit import audit
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.export.export import export
from lazydp.components.models.build import build_model
from lazydp.components.shared.errors import InputError, IntegrityError, PrivacyError, UnavailableError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.ranks.ranks import Ranks
from lazydp.components.train.run import checkpoint as checkpoints
from lazydp.components.train.run import train as trains
from lazydp.components.train.run.checkpoint import Checkpoint
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.train import TrainedRun, train
from lazydp.kernels.noise_key import NoiseKey
from support.ranks_in_threads import together

KEY = 11
SHORT: dict[str, Any] = {"steps": 6, "checkpoint_every": 2, "distributed": {"lanes": 4}}


@pytest.fixture(autouse=True)
def _one_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of threads are built one after the other: torch's generator is one for all of them."""
    lock, build = threading.Lock(), build_model

    def locked(*arguments: Any) -> Any:
        with lock:
            return build(*arguments)

    monkeypatch.setattr(trains, "build_model", locked)


def trained(size: int, *, out: Path, key: int | None = KEY, **given: Any) -> list[TrainedRun]:
    """The run on `size` ranks; with a known key, which rank 0 keeps in the folder."""

    def work(ranks: Ranks) -> TrainedRun:
        return train(out=out, ranks=ranks, key=None if key is None else NoiseKey.for_tests(key), **given)

    return together(size, work)


def latest(run: Path) -> Checkpoint:
    with RunFolder.locked(run) as folder:
        found = folder.latest()
    assert found is not None
    return found


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {name: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for part, node in pairs for key, value in tensors(node, f"{name}/{part}").items()}


def assert_same_bits(ours: Path, theirs: Path) -> None:
    mine, others = (tensors(latest(run).state) for run in (ours, theirs))
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "privacy_unit": "user",
            "sampling": "user",
            "user_gradient": "sum",
            "sampling_prob": 0.2,
            "micro_batch_size": 40,
            "embeddings": {"learning_rate": 1.0, "momentum": 0.5, "weight_decay": 0.01},
        },
    ],
    ids=["examples", "users"],
)
def test_a_run_ends_in_the_same_bits_on_any_number_of_ranks(
    settings: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    url = tiny.ledger(privacy_unit=settings.get("privacy_unit", "example"), epsilon=100.0)
    given = {"dataset": tiny.dataset, "config": tiny.config(**SHORT, **settings), "ledger": url}
    for size in (1, 2, 4):
        runs = trained(size, out=tmp_path / f"on {size}", **given)
        assert [run.step for run in runs] == [6] * size
        assert len({run.identity.run_id for run in runs}) == 1
    assert_same_bits(tmp_path / "on 2", tmp_path / "on 1")
    assert_same_bits(tmp_path / "on 4", tmp_path / "on 1")
    with Ledger.open(url) as ledger:
        assert [run.status for run in ledger.runs()] == ["reserved"] * 3


class StoppedError(Exception):
    """As a kill: nothing is kept after it."""


def stopped_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Every rank ends before it does the step after `step`."""
    right = Engine.step

    def stop(self: Engine, batch: Any) -> Any:
        if self.steps_done == step:
            raise StoppedError
        return right(self, batch)

    patch.setattr(Engine, "step", stop)


@pytest.fixture
def begun(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run on two ranks that ended at step 5 of 6, with a checkpoint of step 4; and what it was given."""
    given = {"dataset": tiny.dataset, "config": tiny.config(**SHORT), "ledger": tiny.ledger()}
    with monkeypatch.context() as patch:
        stopped_at(5, patch)
        with pytest.raises(StoppedError):
            trained(2, out=tmp_path / "run", **given)
    return given


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_checkpoint_of_two_ranks_is_gone_on_with_by_any_number(
    size: int, begun: dict[str, Any], tmp_path: Path
) -> None:
    assert latest(tmp_path / "run").step == 4
    trained(1, out=tmp_path / "whole", **{**begun, "ledger": begun["ledger"]})
    trained(size, out=tmp_path / "run", resume=True, key=None, **begun)
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
    with Ledger.open(begun["ledger"]) as ledger:
        assert [run.status for run in ledger.runs()] == ["reserved", "reserved"]


def files(run: Path, step: int) -> list[Path]:
    return sorted((run / "checkpoints" / f"step-{step:09d}").glob("shard-*"))


def test_rows_lie_in_private_files_of_each_rank(begun: dict[str, Any], tmp_path: Path) -> None:
    found = files(tmp_path / "run", 4)
    assert [file.name for file in found] == [f"shard-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    assert {file.stat().st_mode & 0o777 for file in found[0].parent.iterdir()} == {0o600}
    # No file of rows is in the other state, and each holds about half of the rows.
    state = found[0].parent / "state.safetensors"
    rows = [file.stat().st_size for file in found]
    assert max(rows) < 1.2 * min(rows)
    assert b"embeddings/tables" not in state.read_bytes()


def remove(of_step: list[list[Path]]) -> None:
    of_step[1][1].unlink()


def alter(of_step: list[list[Path]]) -> None:
    content = bytearray(of_step[1][1].read_bytes())
    content[-1] ^= 1
    of_step[1][1].write_bytes(content)


def mix(of_step: list[list[Path]]) -> None:
    of_step[1][1].write_bytes(of_step[0][1].read_bytes())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("damage", [remove, alter, mix])
def test_a_checkpoint_with_a_shard_that_is_not_its_own_is_passed_over_by_name(
    damage: Any, size: int, begun: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage([files(tmp_path / "run", step) for step in (2, 4)])
    trained(size, out=tmp_path / "run", resume=True, key=None, **begun)
    assert "step-000000004/shard-00001-of-00002.safetensors" in caplog.text
    trained(1, out=tmp_path / "whole", **begun)
    assert_same_bits(tmp_path / "run", tmp_path / "whole")  # from step 2, under the same key


def test_a_run_without_a_whole_checkpoint_is_refused(begun: dict[str, Any], tmp_path: Path) -> None:
    for step in (2, 4):
        files(tmp_path / "run", step)[0].unlink()
    with pytest.raises(IntegrityError, match=r"no checkpoint .* is whole.*shard-00000-of-00002"):
        trained(2, out=tmp_path / "run", resume=True, key=None, **begun)


def test_a_rank_that_cannot_write_keeps_the_checkpoint_from_its_name(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write_tensors

    def full(path: Path, content: dict[str, Tensor]) -> str:
        if path.name == "shard-00001-of-00002.safetensors" and "step-000000002" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises((OSError, UnavailableError), match=r"No space left|rank 1 of 2 could not write its rows"):
        trained(2, out=tmp_path / "run", dataset=tiny.dataset, config=tiny.config(**SHORT), ledger=tiny.ledger())
    assert latest(tmp_path / "run").step == 0


def test_a_rank_that_went_another_way_is_named_and_nothing_is_kept(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Engine.step

    def wrong(self: Engine, batch: Any) -> Any:
        report = right(self, batch)
        if self._ranks.rank == 1 and self.steps_done == 3:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] += 1e-7
        return report

    monkeypatch.setattr(Engine, "step", wrong)
    with pytest.raises(PrivacyError, match="rank 1 of 2 has another state of the dense layers than rank 0"):
        trained(2, out=tmp_path / "run", dataset=tiny.dataset, config=tiny.config(**SHORT), ledger=tiny.ledger())
    assert latest(tmp_path / "run").step == 2


def test_an_attempt_that_lost_its_lease_keeps_no_checkpoint(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a host that was cut off, and goes on beside the attempt that took its place."""
    url = tiny.ledger()
    right = Engine.step

    def overtaken(self: Engine, batch: Any) -> Any:
        if self._ranks.rank == 0 and self.steps_done == 3:
            with Ledger.open(url) as ledger:
                ledger.take_lease("mine")
        return right(self, batch)

    given = {"dataset": tiny.dataset, "config": tiny.config(**SHORT), "ledger": url, "run_id": "mine"}
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", overtaken)
        with pytest.raises(PrivacyError, match="this is attempt 1 of run mine, and attempt 2 holds its lease"):
            trained(2, out=tmp_path / "run", **given)
    assert latest(tmp_path / "run").step == 2
    # The control: the next attempt takes the lease, and goes on.
    trained(2, out=tmp_path / "run", resume=True, key=None, **given)
    assert latest(tmp_path / "run").step == 6
    with Ledger.open(url) as ledger:
        assert ledger.state().runs["mine"].generation == 3


def test_ranks_that_were_started_with_something_else_are_refused_before_the_budget(tiny: Any, tmp_path: Path) -> None:
    url = tiny.ledger()
    configs = [tiny.config(**SHORT), tiny.config(**{**SHORT, "negatives": 3})]

    def work(ranks: Ranks) -> TrainedRun:
        return train(dataset=tiny.dataset, config=configs[ranks.rank], out=tmp_path / "run", ledger=url, ranks=ranks)

    with pytest.raises(InputError, match=r"rank 1 was started with something else than rank 0.*negatives"):
        together(2, work)
    with Ledger.open(url) as ledger:
        assert ledger.runs() == ()


def test_ranks_need_a_configuration_for_them(tiny: Any, tmp_path: Path) -> None:
    config = tiny.config(steps=6)
    with pytest.raises(InputError, match="2 ranks were started, and the configuration is that of a run of one process"):
        trained(2, out=tmp_path / "run", dataset=tiny.dataset, config=config, ledger=tiny.ledger())


def test_lanes_do_not_divide_among_more_ranks(tiny: Any, tmp_path: Path) -> None:
    config = tiny.config(**{**SHORT, "distributed": {"lanes": 2}})
    with pytest.raises(InputError, match="2 lanes do not divide among 4 ranks"):
        trained(4, out=tmp_path / "run", dataset=tiny.dataset, config=config, ledger=tiny.ledger())
    with Ledger.open(tiny.ledger()) as ledger:
        assert ledger.runs() == ()


def test_an_audit_of_a_run_of_ranks_is_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="audit the same configuration without `distributed`"):
        audit(dataset=tiny.dataset, config=tiny.config(**SHORT))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "sgd", "noise_multiplier": None}, "mode: sgd"),
        ({"device": "cuda"}, "device"),
        ({"publish_every": 2}, "publish_every"),
    ],
)
def test_what_does_not_go_with_ranks_is_refused_with_the_reason(
    tiny: Any, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=f"distributed does not go with {reason}: "):
        tiny.config(**{**SHORT, **changes})


def test_lanes_are_a_power_of_two(tiny: Any) -> None:
    with pytest.raises(InputError, match="expected a power of two, found 6"):
        tiny.config(distributed={"lanes": 6})


def test_a_configuration_without_ranks_keeps_its_digest(tiny: Any) -> None:
    config: TrainConfig = tiny.config()
    assert "distributed" not in json.dumps(config._deciding())
    assert config.digest() != tiny.config(distributed={}).digest()
    assert tiny.config(distributed={}).digest() != tiny.config(distributed={"lanes": 4}).digest()


def test_a_bundle_from_shards_is_that_of_one_process(tiny: Any, tmp_path: Path) -> None:
    given = {"dataset": tiny.dataset, "config": tiny.config(**SHORT), "ledger": tiny.ledger(epsilon=100.0)}
    tables = []
    for size in (1, 4):
        trained(size, out=tmp_path / f"run {size}", **given)
        bundle = tmp_path / f"bundle {size}"
        export(run=tmp_path / f"run {size}", dataset=tiny.dataset, out=bundle, ledger=given["ledger"])
        found = {file.name: file.read_bytes() for file in bundle.rglob("*.safetensors")}
        tables.append(found)
    assert tables[0]
    assert tables[0] == tables[1]
