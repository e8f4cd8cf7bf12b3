"""One reservation is one noise key: no second model with other noise leaves under one charge."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.bundle.reader import Bundle
from lazydp.components.export.export import export
from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import InputError, PrivacyError
from lazydp.components.train.run.train import train
from lazydp.kernels.noise_key import NoiseKey

SETTINGS = {"steps": 2, "checkpoint_every": 1}


def trained(tiny: Any, out: Path, **more: Any) -> Path:
    given = {"dataset": tiny.dataset, "config": tiny.config(**SETTINGS), "out": out, "resume": True}
    folder: Path = train(**{**given, "ledger": f"sqlite:///{tiny.folder / 'ledger.db'}", **more}).folder
    return folder


def released(tiny: Any, run: Path, name: str, *, ledger: str = "ledger.db") -> Any:
    url = f"sqlite:///{tiny.folder / ledger}"
    return export(run=run, dataset=tiny.dataset, out=tiny.folder / name, ledger=url)


def copied(run: Path, *forget: str) -> Path:
    copy = run.with_name("copy")
    shutil.copytree(run, copy)
    for name in forget:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def test_a_copy_that_lost_its_key_trains_nothing(tiny: Any) -> None:
    tiny.ledger()
    run = trained(tiny, tiny.folder / "run")
    copy = copied(run, "checkpoints", "root.key")
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        trained(tiny, copy)
    released(tiny, run, "bundle")
    with pytest.raises(PrivacyError, match=r"bound to one noise key|no reservation|committed"):
        trained(tiny, copy)


def test_one_run_id_in_two_folders_is_refused(tiny: Any) -> None:
    tiny.ledger()
    trained(tiny, tiny.folder / "one", run_id="nightly")
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        trained(tiny, tiny.folder / "two", run_id="nightly")
    assert not list((tiny.folder / "two").rglob("state.safetensors"))


def test_a_copy_with_its_key_is_the_same_run(tiny: Any) -> None:
    """Trained again under the same key it draws the same noise: the same bits, and nothing new is told."""
    tiny.ledger()
    run = trained(tiny, tiny.folder / "run")
    copy = trained(tiny, copied(run, "checkpoints"))
    first = released(tiny, run, "bundle")
    # The run is over now. Its copy, which has the same key, may only repeat what was released.
    second = released(tiny, copy, "bundle-of-copy")
    tables = [(tiny.folder / name / first.tables[0].file).read_bytes() for name in ("bundle", "bundle-of-copy")]
    assert tables[0] == tables[1]
    with Ledger.open(f"sqlite:///{tiny.folder / 'ledger.db'}") as ledger:
        [own] = ledger.runs()
        assert {first.version, second.version} == {release.release for release in own.releases}
        assert not verify(ledger.entries()).problems


def test_what_was_trained_elsewhere_is_not_released_here(tiny: Any) -> None:
    """The copy trains against a ledger of its own, and is exported against the one that charged the original."""
    tiny.ledger()
    run = trained(tiny, tiny.folder / "run")
    copy = copied(run, "checkpoints", "root.key")
    other = f"sqlite:///{tiny.folder / 'elsewhere' / 'ledger.db'}"
    (tiny.folder / "elsewhere").mkdir()
    elsewhere = type(tiny)(tiny.dataset, tiny.folder / "elsewhere")
    elsewhere.ledger()
    try:
        trained(tiny, copy, ledger=other)
    except PrivacyError:
        return  # refused even before
    released(tiny, run, "bundle")
    with pytest.raises(PrivacyError, match="noise key"):
        released(tiny, copy, "second")
    assert not (tiny.folder / "second").exists()


def test_a_copy_made_after_the_release_is_refused(tiny: Any) -> None:
    tiny.ledger()
    run = trained(tiny, tiny.folder / "run")
    released(tiny, run, "bundle")
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        trained(tiny, copied(run, "checkpoints"))


def test_a_run_goes_on_under_the_key_that_it_was_refused_with(tiny: Any) -> None:
    """Killed, or refused its budget, between its reservation and its first checkpoint, it is the same run again."""
    tiny.ledger(epsilon=1e-3)
    with pytest.raises(PrivacyError):
        trained(tiny, tiny.folder / "run", run_id="nightly")
    key = (tiny.folder / "run" / "root.key").read_bytes()
    with Ledger.open(f"sqlite:///{tiny.folder / 'ledger.db'}") as ledger:
        ledger.set_budget("tiny", epsilon=1000.0, delta=1e-5, by="officer", reason="test")
    trained(tiny, tiny.folder / "run", run_id="nightly")
    assert (tiny.folder / "run" / "root.key").read_bytes() == key
    assert (tiny.folder / "run" / "root.key").stat().st_mode & 0o777 == 0o600
    released(tiny, tiny.folder / "run", "bundle")
    assert not list((tiny.folder / "run").rglob("*.key"))


def test_the_gate_reserves_for_the_first_key_that_comes(tiny: Any) -> None:
    from lazydp.components.ingest.dataset import EncodedDataset
    from lazydp.components.shared.version import code_version
    from lazydp.components.train.run.identity import RunIdentity
    from lazydp.components.train.run.spending import reserve

    url, data, config = tiny.ledger(), EncodedDataset.open(tiny.dataset), tiny.config(**SETTINGS)
    identity = RunIdentity("piped", config, data.manifest.fingerprint, code_version(), config.noise_multiplier)
    reserve(url, identity, data)
    with Ledger.open(url) as ledger:
        assert ledger.runs()[0].key == ""
    trained(tiny, tiny.folder / "one", run_id="piped")
    reserve(url, identity, data)  # the gate, repeated
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        trained(tiny, tiny.folder / "two", run_id="piped")
    with Ledger.open(url) as ledger:
        assert [entry.kind for entry in ledger.entries()][-2:] == ["reserved", "bound"]
        assert not verify(ledger.entries()).problems


def test_a_checkpoint_of_another_key_is_refused(tiny: Any) -> None:
    tiny.ledger()
    one = trained(tiny, tiny.folder / "one")
    other = trained(tiny, tiny.folder / "two")
    (one / "root.key").write_bytes((other / "root.key").read_bytes())
    with pytest.raises(PrivacyError, match="another noise key"):
        released(tiny, one, "bundle")


@pytest.mark.parametrize("forget", [("root.key",), ("checkpoints",)])
def test_folders_of_an_older_lazydp_are_released(tiny: Any, forget: tuple[str, ...]) -> None:
    """Their key lies in the checkpoints alone; without those they begin anew under the key of the run."""
    tiny.ledger()
    run = trained(tiny, tiny.folder / "run")
    copy = copied(run, *forget)
    trained(tiny, copy)
    assert released(tiny, copy, "bundle").private
    assert Bundle.open(tiny.folder / "bundle").manifest.private


def test_a_run_stays_with_its_ledger(tiny: Any) -> None:
    """Trained under one ledger and voided there, it is not released under another."""
    url = tiny.ledger()
    run = trained(tiny, tiny.folder / "run")
    (tiny.folder / "elsewhere").mkdir()
    other = type(tiny)(tiny.dataset, tiny.folder / "elsewhere").ledger()
    with Ledger.open(url) as ledger:
        [own] = ledger.runs()
        ledger.void(own.run_id, by="officer", reason="crashed")
    for attempt in (
        lambda: trained(tiny, run, ledger=other),
        lambda: export(run=run, dataset=tiny.dataset, out=tiny.folder / "bundle", ledger=other),
    ):
        with pytest.raises(PrivacyError, match="reserved in another ledger"):
            attempt()
    with Ledger.open(other) as ledger:
        assert ledger.runs() == ()


def test_a_changed_dataset_under_an_old_key_is_refused(tiny: Any) -> None:
    """Two models under one key differ by nothing but the rows that changed: their difference has no noise."""
    tiny.ledger()
    source = tiny.dataset.parent
    table = pq.read_table(source / "interactions.parquet")
    pq.write_table(table.slice(0, 899), tiny.folder / "fewer.parquet")
    ingest([str(tiny.folder / "fewer.parquet")], str(source / "spec.yaml"), tiny.folder / "changed")
    manifest = tiny.folder / "changed" / "dataset.json"
    document = json.loads(manifest.read_text())
    believed = json.loads((tiny.dataset / "dataset.json").read_text())
    document |= {name: believed[name] for name in ("fingerprint", "source")}
    manifest.write_text(json.dumps(document))

    run = trained(tiny, tiny.folder / "run", run_id="nightly")
    copy = copied(run, "checkpoints")
    with pytest.raises((PrivacyError, InputError)):
        trained(tiny, copy, run_id="nightly", dataset=tiny.folder / "changed")
    # Even where the copy forgot what it was trained on.
    (copy / "run.json").unlink()
    key = NoiseKey.from_bytes((run / "root.key").read_bytes()[:32], is_test=False)
    with pytest.raises(PrivacyError, match="begun on other files"):
        trained(tiny, copy, run_id="nightly", dataset=tiny.folder / "changed", key=key)
    with pytest.raises(InputError, match="other content"):
        export(
            run=run,
            dataset=tiny.folder / "changed",
            out=tiny.folder / "bundle",
            ledger=f"sqlite:///{tiny.folder / 'ledger.db'}",
        )


def test_a_bundle_holds_the_head_of_the_ledger(tiny: Any) -> None:
    url = tiny.ledger()
    run = trained(tiny, tiny.folder / "run")
    with Ledger.open(url) as ledger:
        head = ledger.head()
    assert released(tiny, run, "bundle").lineage.ledger_head == head
    with Ledger.open(url, read_only=True) as ledger:
        assert not verify(ledger.entries(), expect_head=head).problems
