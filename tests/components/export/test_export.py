"""Nothing is released without flush, proof, commit and the end of its key; and a kill in between loses nothing."""

import base64
import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.signature import read_public_key
from lazydp.components.export import export as module
from lazydp.components.export.export import export
from lazydp.components.export.publish import Snapshots
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import (
    InputError,
    NonFiniteError,
    NotPrivateError,
    PendingNoiseError,
    PrivacyError,
    UnavailableError,
)
from lazydp.components.shared.files import sha256_file
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.train import train
from lazydp.components.train.tables.embedding_tables import EmbeddingTables
from lazydp.kernels.noise_key import NoiseKey
from support.signing_keys import make_keys


class Killed(BaseException):
    """Stands for `kill -9`: nothing of ours catches it."""


@pytest.fixture
def run(tiny: Any) -> Path:
    """A finished run under a secret key."""
    out: Path = train(dataset=tiny.dataset, config=tiny.config(), out=tiny.folder / "run", ledger=tiny.ledger()).folder
    return out


def release(tiny: Any, **changes: Any) -> Any:
    given = {
        "run": tiny.folder / "run",
        "dataset": tiny.dataset,
        "out": tiny.folder / "bundle",
        "ledger": f"sqlite:///{tiny.folder / 'ledger.db'}",
    }
    return export(**{**given, **changes})


def statuses(tiny: Any) -> list[str]:
    with Ledger.open(f"sqlite:///{tiny.folder / 'ledger.db'}") as ledger:
        return [entry.status for entry in ledger.runs()]


def key_of(run: Path) -> bytes:
    with RunFolder.locked(run) as folder:
        found = folder.latest()
    assert found is not None
    assert found.key is not None
    return found.key.to_bytes()


def test_a_run_becomes_a_bundle_and_can_never_go_on(tiny: Any, run: Path) -> None:
    manifest = release(tiny, name="first")
    bundle = Bundle.open(tiny.folder / "bundle")
    assert bundle.manifest == manifest
    assert manifest.name == "first"
    assert manifest.private
    assert {table.flushed_step for table in manifest.tables} == {30}
    assert statuses(tiny) == ["committed"]
    assert [path.name for path in tiny.folder.iterdir() if path.name.startswith(".bundle")] == []
    with pytest.raises(InputError, match="noise key destroyed"):
        train(dataset=tiny.dataset, config=tiny.config(), out=run, ledger=tiny.ledger(), resume=True)
    assert not list(run.rglob("noise.key"))


def test_the_flush_leaves_the_checkpoint_as_it_is(tiny: Any, run: Path) -> None:
    """The tables are flushed in a private mapping of the checkpoint, which a killed export has to find again."""
    states = sorted((run / "checkpoints").glob("*/state.safetensors"))
    before = [sha256_file(state) for state in states]
    release(tiny)
    assert states
    assert [sha256_file(state) for state in states] == before


def test_the_statement_says_what_was_done(tiny: Any, run: Path) -> None:
    from lazydp.components.budget.accounting.epsilon import epsilon

    release(tiny)
    config = tiny.config()
    statement = Bundle.open(tiny.folder / "bundle").statement
    assert statement.private
    assert statement.epsilon == epsilon(RunCost(config, 20).of_run(), delta=1e-5)
    assert statement.epsilon_rdp is not None
    assert statement.epsilon_user_level is not None
    assert statement.epsilon_without_amplification is not None
    assert statement.epsilon < statement.epsilon_rdp < statement.epsilon_without_amplification
    assert statement.epsilon < statement.epsilon_user_level
    assert statement.epsilon_over_steps[-1].step == statement.steps == 30
    assert (statement.sampler, statement.noise_multiplier, statement.max_grad_norm) == ("poisson", 4.0, 0.5)
    assert statement.max_examples_per_user == 20
    beyond = [line for line in statement.not_covered if line.startswith("an interaction beyond")]
    assert beyond == [
        "an interaction beyond its own training example: it also stands in the histories of its user's later examples, "
        "and it decides which of its user's rows is held out, and it decides which 20 of its user's rows are kept; "
        "privacy_unit user covers a whole person"
    ]


def test_what_else_was_spent_is_stated(tiny: Any, run: Path) -> None:
    release(tiny)
    url = f"sqlite:///{tiny.folder / 'ledger.db'}"
    train(dataset=tiny.dataset, config=tiny.config(steps=5), out=tiny.folder / "second", ledger=url, run_id="second")
    release(tiny, run=tiny.folder / "second", out=tiny.folder / "bundle-2")
    (other,) = Bundle.open(tiny.folder / "bundle-2").statement.spent_elsewhere
    assert other.purpose == "training"
    assert other.epsilon == pytest.approx(Bundle.open(tiny.folder / "bundle").statement.epsilon)


def test_no_file_log_line_or_entry_holds_the_key(tiny: Any, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = NoiseKey.from_bytes(key_of(run), is_test=False)
    secrets = [key.to_bytes(), *(key.derive(label).to_bytes() for label in ("noise", "sampling", "negatives"))]
    release(tiny)
    files = [path for path in tiny.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    texts = [caplog.text.encode(), *(path.read_bytes() for path in files)]
    for secret in secrets:
        for spelling in (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
            assert not any(spelling in text for text in texts)


def test_nothing_that_is_published_is_a_hash_of_the_data(tiny: Any, run: Path) -> None:
    """Neither bundle nor ledger holds what somebody who guessed the data right could recompute."""
    manifest = release(tiny)
    private = EncodedDataset.open(tiny.dataset).manifest
    bundle = [path for path in (tiny.folder / "bundle").rglob("*") if path.is_file()]
    published = b"".join(path.read_bytes() for path in [*bundle, tiny.folder / "ledger.db"])
    for digest in (private.fingerprint, private.source.digest):
        for spelling in (
            digest,
            hashlib.sha256(digest.encode()).hexdigest(),
            hashlib.sha256(bytes.fromhex(digest)).hexdigest(),
        ):
            assert spelling[:12].encode() not in published
        # the control: it stands where it is private
        assert digest.encode() in (tiny.dataset / "dataset.json").read_bytes()
    assert private.fingerprint.encode() in (run / "run.json").read_bytes()
    with Ledger.open(f"sqlite:///{tiny.folder / 'ledger.db'}") as ledger:
        assert manifest.lineage.dataset == ledger.show("tiny").dataset
    # and neither does the secret stand there, under which the owner can
    assert (tiny.folder / "ledger.db.secret").read_bytes().strip() not in published


STAGES = {
    "flush": (EmbeddingTables, "flush"),
    "proof": (module, "prove_flushed"),
    "stage": (module, "write_bundle"),
    "commit": (module, "commit"),
    "record": (module, "write_json"),
    "destroy": (RunFolder, "destroy_keys"),
    "sign": (module, "sign"),
    "publish": (module, "_publish"),
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_kill_between_any_two_steps(
    stage: str, moment: str, tiny: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = STAGES[stage]
    original: Callable[..., Any] = getattr(owner, name)
    keys = make_keys(tiny.folder)

    def killed(*arguments: Any, **named: Any) -> Any:
        if moment == "after":
            original(*arguments, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            release(tiny, sign_key=keys.private)
    released = (tiny.folder / "bundle").exists()
    assert released == (stage == "publish" and moment == "after")
    if released:
        assert statuses(tiny) == ["committed"]
        assert not list(run.rglob("noise.key"))
    manifest = release(tiny, sign_key=keys.private)
    assert Bundle.open(tiny.folder / "bundle", signed_by=[read_public_key(keys.public)]).manifest == manifest
    assert statuses(tiny) == ["committed"]
    assert not list(run.rglob("noise.key"))
    assert [path.name for path in tiny.folder.iterdir() if path.name.startswith(".bundle")] == []


def test_a_key_half_destroyed_is_destroyed_wholly(tiny: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazydp.components.train.run import checkpoint

    destroyed: list[Path] = []
    original = checkpoint.destroy_file

    def once(path: Path) -> None:
        if destroyed:
            raise Killed
        destroyed.append(path)
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "destroy_file", once)
        with pytest.raises(Killed):
            release(tiny)
    assert len(list(run.rglob("noise.key"))) == 1
    assert not (tiny.folder / "bundle").exists()
    release(tiny)
    assert not list(run.rglob("noise.key"))
    assert (tiny.folder / "bundle").exists()


def test_a_signing_key_that_is_none_is_refused_first(tiny: Any, run: Path) -> None:
    with pytest.raises(InputError, match="signing key"):
        release(tiny, sign_key=tiny.folder / "none.pem")
    with pytest.raises(InputError, match="signing key"):
        Snapshots(tiny.folder / "snapshots", sign_key=tiny.folder / "none.pem")
    assert statuses(tiny) == ["reserved"]
    assert list(run.rglob("noise.key"))


def test_without_a_reservation_nothing_is_released(tiny: Any, run: Path) -> None:
    other = f"sqlite:///{tiny.folder / 'other.db'}"
    with pytest.raises(UnavailableError, match="no ledger"):
        release(tiny, ledger=other)
    Ledger.open(other).close()
    with pytest.raises(PrivacyError, match="another ledger"):
        release(tiny, ledger=other)
    assert not (tiny.folder / "bundle").exists()
    assert list(run.rglob("noise.key"))


def test_an_unfinished_run_is_refused(tiny: Any, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-000000030")
    with pytest.raises(InputError, match=r"stands at step 20 of 30: finish it with `lazydp train --resume`"):
        release(tiny)


def test_an_output_that_is_there_is_kept(tiny: Any, run: Path) -> None:
    (tiny.folder / "bundle").mkdir()
    (tiny.folder / "bundle" / "precious").touch()
    with pytest.raises(InputError, match="already exists"):
        release(tiny)
    assert list(run.rglob("noise.key"))


def test_a_run_of_sgd_is_released_only_on_demand_and_marked(tiny: Any) -> None:
    train(dataset=tiny.dataset, config=tiny.config(mode="sgd"), out=tiny.folder / "run")
    with pytest.raises(NotPrivateError, match="--allow-non-private"):
        release(tiny)
    manifest = release(tiny, allow_non_private=True)
    assert manifest.mode == "sgd"
    with pytest.raises(NotPrivateError):
        Bundle.open(tiny.folder / "bundle")
    assert manifest.lineage.dataset == "unregistered"
    statement = Bundle.open(tiny.folder / "bundle", allow_non_private=True).statement
    assert not statement.private
    assert statement.epsilon is None
    assert statement.noise_multiplier == 0.0
    assert statement.max_grad_norm is None
    assert statement.why_not_private == "trained in mode sgd, without clipping and without noise"


def test_a_test_key_marks_the_bundle(tiny: Any) -> None:
    url = tiny.ledger()
    train(dataset=tiny.dataset, config=tiny.config(), out=tiny.folder / "run", ledger=url, key=NoiseKey.for_tests(1))
    assert release(tiny).test_key
    with pytest.raises(NotPrivateError):
        Bundle.open(tiny.folder / "bundle")
    statement = Bundle.open(tiny.folder / "bundle", allow_test_key=True).statement
    assert statement.epsilon is None
    assert statement.why_not_private == "trained under a noise key made for tests, which everyone knows"


@pytest.mark.parametrize("selected", [False, True])
def test_a_trial_of_a_sweep_is_released_only_where_the_sweep_kept_it(tmp_path: Path, selected: bool) -> None:
    trial: Any = SimpleNamespace(
        config=SimpleNamespace(private=True), tuning="of a sweep", selected=selected, run_id="sweep-1"
    )
    folder: Any = SimpleNamespace(path=tmp_path, identity=lambda: trial)
    if selected:
        assert module._identity(folder, allow_non_private=False) is trial
    else:
        with pytest.raises(PrivacyError, match="one trial of sweep sweep-1"):
            module._identity(folder, allow_non_private=False)


def test_weights_that_are_not_finite_are_refused(tiny: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = EmbeddingTables.flush

    def poisoned(self: EmbeddingTables) -> None:
        flush(self)
        self.state_dict()["tables"]["item"]["weight"][3, 2] = torch.nan

    monkeypatch.setattr(EmbeddingTables, "flush", poisoned)
    with pytest.raises((NonFiniteError, PendingNoiseError)):
        release(tiny)
    assert not (tiny.folder / "bundle").exists()
    assert statuses(tiny) == ["reserved"]


def test_a_flush_that_does_nothing_is_caught(tiny: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmbeddingTables, "flush", lambda self: None)
    with pytest.raises(PendingNoiseError, match=r"table '\w+', row \d+: its noise is applied up to step"):
        release(tiny)
