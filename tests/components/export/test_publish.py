"""Snapshots of a run: one mechanism, no noise twice, and the bits of an undisturbed run whatever is killed."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.signature import check_signature, read_public_key
from lazydp.components.export import export as export_module
from lazydp.components.export import publish as module
from lazydp.components.export.export import export
from lazydp.components.export.publish import Snapshots
from lazydp.components.shared.errors import InputError, PendingNoiseError
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.train import train
from lazydp.components.train.tables.embedding_tables import EmbeddingTables
from lazydp.kernels import ops
from lazydp.kernels.noise_key import NoiseKey
from support.signing_keys import make_keys

SETTINGS = {"steps": 25, "publish_every": 10, "embeddings": {"learning_rate": 1.0, "momentum": 0.5}}


class Killed(BaseException):
    """Stands for `kill -9`: nothing of ours catches it."""


def publish(tiny: Any, folder: Path, **changes: Any) -> Any:
    url = f"sqlite:///{tiny.folder / 'ledger.db'}"
    given = {
        "dataset": tiny.dataset,
        "config": tiny.config(**SETTINGS),
        "out": folder / "run",
        "ledger": url,
        "key": NoiseKey.for_tests(3),
        "publish": Snapshots(folder / "snapshots", url).release,
    }
    return train(**{**given, **changes})


def opened(folder: Path) -> dict[str, Bundle]:
    """The snapshots by name."""
    found = (path for path in sorted((folder / "snapshots").glob("step-*")))
    return {path.name: Bundle.open(path, allow_test_key=True) for path in found}


def ledger(tiny: Any) -> Ledger:
    return Ledger.open(f"sqlite:///{tiny.folder / 'ledger.db'}")


def test_snapshots_are_charged_once_at_the_latest(tiny: Any, tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    snapshots = Snapshots(tmp_path / "snapshots", tiny.ledger(), sign_key=keys.private)
    publish(tiny, tmp_path, key=None, publish=snapshots.release)
    config = tiny.config(**SETTINGS)
    at = {step: epsilon(RunCost(config, 20).of_run(steps=step), delta=1e-5) for step in (10, 20, 25)}
    assert {bundle.statement.steps: bundle.statement.epsilon for bundle in opened(tmp_path).values()} == {
        10: at[10],
        20: at[20],
    }
    assert (tmp_path / "snapshots" / "current").resolve().name == "step-000000020"
    for bundle in opened(tmp_path).values():
        check_signature(bundle.path, [read_public_key(keys.public)])
    with ledger(tiny) as found:
        [run] = found.runs()
        assert run.status == "reserved"
        assert {release.step: release.epsilon for release in run.releases} == pytest.approx({10: at[10], 20: at[20]})
        budget = found.show("tiny")
        # Released so far: the latest, neither the sum nor the whole; charged: the reservation, until the run is over.
        assert budget.committed_epsilon == pytest.approx(at[20])
        assert budget.charged_epsilon == pytest.approx(at[25])
    assert list((tmp_path / "run").rglob("noise.key"))
    manifest = export(
        run=tmp_path / "run",
        dataset=tiny.dataset,
        out=tmp_path / "bundle",
        ledger=f"sqlite:///{tiny.folder / 'ledger.db'}",
    )
    assert manifest.step == 25
    with ledger(tiny) as found:
        budget = found.show("tiny")
        assert budget.charged_epsilon == budget.committed_epsilon == pytest.approx(at[25])
        assert budget.releases == 3
        assert verify(found.entries()).problems == ()
    assert not list((tmp_path / "run").rglob("noise.key"))


# --- addresses ---------------------------------------------------------------------------------------------------


class Addresses:
    """Counts every (key, table, row, step) at which noise is drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[tuple[bytes, int, int, int]] = Counter()
        self.by_reading = 0  # tables that caught up because they were read
        catch_up, flush, both = ops.foreach_catch_up_, ops.flush_, ops.foreach_catch_up_bag_sum_

        def note_listed(key: Any, last: Any, rows: Any, tables: Any, step: int) -> None:
            for number, since, listed in zip(tables, last, rows, strict=True):
                self.by_reading += 1
                self._note(key, number, listed[since[listed] < step], step)

        def watched_catch_up(
            weights: Any, last: Any, rows: Any, key: Any, *, tables: Any, step: int, **more: Any
        ) -> Any:
            note_listed(key, last, rows, tables, step)
            return catch_up(weights, last, rows, key, tables=tables, step=step, **more)

        def watched_flush(weight: Any, last: Any, key: Any, *, table: int, step: int, **more: Any) -> Any:
            self._note(key, table, torch.nonzero(last < step).squeeze(1), step)
            return flush(weight, last, key, table=table, step=step, **more)

        def watched_both(
            weights: Any, last: Any, groups: Any, key: Any, *bags: Any, tables: Any, step: int, **more: Any
        ) -> Any:
            note_listed(key, last, [group.rows for group in groups], tables, step)
            return both(weights, last, groups, key, *bags, tables=tables, step=step, **more)

        monkeypatch.setattr(ops, "foreach_catch_up_", watched_catch_up)
        monkeypatch.setattr(ops, "flush_", watched_flush)
        monkeypatch.setattr(ops, "foreach_catch_up_bag_sum_", watched_both)

    def _note(self, key: Any, table: int, rows: Any, step: int) -> None:
        self.seen.update((key.numpy().tobytes(), table, row, step) for row in rows.tolist())


def test_no_address_is_used_twice(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.ledger()
    addresses = Addresses(monkeypatch)
    publish(tiny, tmp_path)
    assert len(addresses.seen) > 500
    assert addresses.by_reading > 20
    assert max(addresses.seen.values()) == 1


def test_a_flush_that_forgets_what_it_did_would_be_seen(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: rows whose `last` isn't moved draw at the same address again."""
    tiny.ledger()
    flush = EmbeddingTables.flush

    def forgetful(self: EmbeddingTables) -> None:
        before = {name: table["last"].clone() for name, table in self.state_dict()["tables"].items()}
        flush(self)
        if self.step == 10:
            for name, table in self.state_dict()["tables"].items():
                table["last"].copy_(before[name])

    monkeypatch.setattr(EmbeddingTables, "flush", forgetful)
    # The exporter's proof refuses it, as the tables do; without either the addresses show it.
    with pytest.raises(PendingNoiseError):
        publish(tiny, tmp_path / "proven")
    monkeypatch.setattr(
        export_module, "prove_flushed", lambda tables, pending, *, step, **more: dict.fromkeys(tables, step)
    )
    monkeypatch.setattr(EmbeddingTables, "pending", lambda self: 0)
    addresses = Addresses(monkeypatch)
    publish(tiny, tmp_path)
    assert max(addresses.seen.values()) == 2


# --- kills ---------------------------------------------------------------------------------------------------------


def final_bits(folder: Path) -> dict[str, torch.Tensor]:
    with RunFolder.locked(folder / "run") as held:
        checkpoint = held.latest()
    assert checkpoint is not None
    assert checkpoint.step == 25
    tables = checkpoint.state["embeddings"]["tables"]
    return {**{name: table["weight"] for name, table in tables.items()}, **checkpoint.state["dense"]["model"]}


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "a step": (Engine, "step", 15),
    "flush": (Engine, "flush", 2),
    "proof": (export_module, "prove_flushed", 2),
    "stage": (module, "stage", 2),
    "commit": (module, "commit", 2),
    "point": (module, "point", 2),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_killed_run_ends_in_the_same_bits_and_snapshots(
    moment: str, when: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.ledger()
    publish(tiny, tmp_path / "whole")
    owner, name, at = MOMENTS[moment]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def killed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < at:
            return original(*arguments, **named)
        if when == "after":
            original(*arguments, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            publish(tiny, tmp_path / "killed")
    with ledger(tiny) as found:
        committed = [release.step for release in found.runs()[1].releases]
    assert len(opened(tmp_path / "killed")) <= len(committed)  # none stands without its commit
    publish(tiny, tmp_path / "killed", resume=True)
    whole, again = opened(tmp_path / "whole"), opened(tmp_path / "killed")
    assert list(whole) == list(again) == ["step-000000010", "step-000000020"]
    for snapshot, bundle in whole.items():
        assert bundle.manifest.version == again[snapshot].manifest.version or _only_the_statement_differs(
            bundle, again[snapshot]
        )
    ours, theirs = final_bits(tmp_path / "killed"), final_bits(tmp_path / "whole")
    for tensor, weight in theirs.items():
        assert torch.equal(weight, ours[tensor]), tensor
    with ledger(tiny) as found:
        assert [release.step for release in found.runs()[1].releases] == [10, 20]
    assert (tmp_path / "killed" / "snapshots" / "current").resolve().name == "step-000000020"
    assert not [path for path in (tmp_path / "killed" / "snapshots").iterdir() if path.name.startswith(".")]


def _only_the_statement_differs(one: Bundle, other: Bundle) -> bool:
    """The second run's statement names what the first one spent; every file is the same."""
    return one.manifest.files == other.manifest.files and one.statement != other.statement


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["kernels", "torch", "threads"])
def test_snapshots_go_on_with_the_instructions_they_began_with(
    change: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums that are rounded otherwise would share the noise of a snapshot that is out."""
    tiny.ledger()
    publish(tiny, tmp_path)
    publish(tiny, tmp_path, resume=True)  # the control: the same processor
    patches: dict[str, tuple[Any, str, Any]] = {
        "kernels": (ops, "simd_level", lambda: "another"),
        "torch": (torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER"),
        "threads": (torch, "get_num_threads", lambda: 77),
    }
    monkeypatch.setattr(*patches[change])
    with pytest.raises(InputError, match=r"processor torch .* to the same bits .*OMP_NUM_THREADS"):
        publish(tiny, tmp_path, resume=True)


def test_the_steps_of_publishing_belong_to_the_run(tiny: Any, tmp_path: Path) -> None:
    tiny.ledger()
    publish(tiny, tmp_path)
    with pytest.raises(InputError, match="publish_every: 5 != 10"):
        publish(tiny, tmp_path, config=tiny.config(**{**SETTINGS, "publish_every": 5}), resume=True)
    with pytest.raises(InputError, match="publish_every: None != 10"):
        publish(tiny, tmp_path, config=tiny.config(**{**SETTINGS, "publish_every": None}), publish=None, resume=True)


def test_where_and_how_often_go_together(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--publish-to where"):
        publish(tiny, tmp_path, publish=None)
    with pytest.raises(InputError, match="give both or neither"):
        publish(tiny, tmp_path, config=tiny.config())
    with pytest.raises(InputError, match="without privacy are not released"):
        tiny.config(**{**SETTINGS, "mode": "sgd"})


def test_two_runs_do_not_share_a_folder(tiny: Any, tmp_path: Path) -> None:
    tiny.ledger()
    publish(tiny, tmp_path)
    with pytest.raises(InputError, match="is a snapshot of run"):
        publish(tiny, tmp_path, out=tmp_path / "other")


def test_a_pointer_moves_from_bundle_to_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/one", "b/two"):
        Path(name).mkdir(parents=True)
        module.point(Path("a/current"), Path(name))
        assert Path("a/current").resolve() == (tmp_path / name).resolve()
    assert sorted(path.name for path in Path("a").iterdir()) == ["current", "one"]


def test_a_pointer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    with pytest.raises(InputError, match="is no link"):
        module.point(tmp_path / "current", tmp_path / "step-1")
