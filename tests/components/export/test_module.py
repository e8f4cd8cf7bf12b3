"""export_module: nothing leaves without its charge, and what leaves carries its statement."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.module_release import load_module_release
from lazydp.components.bundle.reader import Bundle
from lazydp.components.export import module as exporting
from lazydp.components.export.module import export_module
from lazydp.components.shared.errors import (
    BudgetExceededError,
    FormatError,
    InputError,
    IntegrityError,
    NonFiniteError,
    NotPrivateError,
    PendingNoiseError,
    PrivacyError,
)
from lazydp.components.train.accounted_trainer import AccountedTrainer
from lazydp.kernels.noise_key import NoiseKey
from support.own_module import EPOCHS, ledger_of_clicks, module, prepared, trained


@pytest.fixture
def clicks(tmp_path: Path) -> str:
    return ledger_of_clicks(tmp_path)


def ready(*, passes: int = EPOCHS, model: nn.Module | None = None, **changes: Any) -> AccountedTrainer:
    """A trainer after its steps, under a key that nobody knows unless another is given."""
    trainer, loader = prepared(model, **{"key": None, **changes})
    trained(trainer, loader, passes=passes)
    return trainer


def charged(url: str) -> float:
    with Ledger.open(url, read_only=True) as ledger:
        return ledger.show("clicks").committed_epsilon


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, AccountedTrainer]]:
    """A release of a training that was reserved before: its folder, its ledger, its trainer."""
    folder = tmp_path_factory.mktemp("released")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        url = ledger_of_clicks(folder)
        trainer = ready(dataset="clicks", ledger=url, run_id="run-of-clicks")
        export_module(trainer, folder / "model", name="clicks-model", assumed_public=["the catalogue"])
        yield folder / "model", url, trainer


def test_a_release_has_the_weights_and_the_statement(released: tuple[Path, str, AccountedTrainer]) -> None:
    folder, url, trainer = released
    release = load_module_release(folder)
    other = module()
    other.load_state_dict(release.weights)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    statement = release.statement
    assert statement.private
    assert statement.epsilon == trainer.epsilon(1e-5)
    assert 1.99 < (statement.epsilon or 0) <= 2.0 < (statement.epsilon_rdp or 0) * 1.1
    assert (statement.sampler, statement.privacy_unit, statement.steps) == ("poisson", "example", 8)
    assert "the catalogue" in statement.assumed_public
    assert exporting.RESERVED_LATE not in statement.not_covered
    assert statement.family is not None
    assert statement.family.name == "customers"
    assert statement.realised_noise is not None
    assert abs(statement.realised_noise.variance - 1) < 6 * statement.realised_noise.standard_error
    assert charged(url) == pytest.approx(statement.epsilon)
    with Ledger.open(url, read_only=True) as ledger:
        (entry,) = ledger.releases()
        assert (entry.release, entry.run_id) == (release.manifest.version, "run-of-clicks")
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "model.safetensors"}


def test_after_the_release_the_key_is_gone(released: tuple[Path, str, AccountedTrainer], tmp_path: Path) -> None:
    _, _, trainer = released
    assert trainer.closed
    assert repr(trainer.key.key) == "NoiseKey(<destroyed>)"
    with pytest.raises(PrivacyError, match="closed"):
        export_module(trainer, tmp_path / "again", name="again")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 40), IntegrityError),
        (lambda folder: (folder / "more").write_text("x"), IntegrityError),
        (lambda folder: edit(folder, flushed_steps={"0": 7}), PendingNoiseError),
        (lambda folder: edit(folder, test_key=True), NotPrivateError),
        (lambda folder: edit(folder, kind="bundle"), FormatError),
        (lambda folder: edit(folder, step="x"), FormatError),
        (lambda folder: edit(folder, format_version=99), FormatError),
        (lambda folder: (folder / "manifest.json").unlink(), FormatError),
    ],
)
def test_a_release_that_is_not_whole_is_refused(
    damage: Any, error: type[Exception], released: tuple[Path, str, AccountedTrainer], tmp_path: Path
) -> None:
    copied = tmp_path / "model"
    copied.mkdir()
    for path in released[0].iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    load_module_release(copied)
    damage(copied)
    with pytest.raises(error):
        load_module_release(copied)


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**document, **changes}))


def test_it_is_no_bundle(released: tuple[Path, str, AccountedTrainer]) -> None:
    with pytest.raises(FormatError):
        Bundle.open(released[0])


# --- the charge ----------------------------------------------------------------------------------------------------


def test_without_a_reservation_it_is_reserved_at_the_export_and_says_so(clicks: str, tmp_path: Path) -> None:
    trainer = ready()
    with pytest.raises(InputError, match="say whose"):
        export_module(trainer, tmp_path / "model", name="model")
    release = export_module(trainer, tmp_path / "model", name="model", ledger=clicks, dataset="clicks")
    assert exporting.RESERVED_LATE in release.statement.not_covered
    assert charged(clicks) == pytest.approx(release.statement.epsilon)


def test_a_model_with_padding_is_released_with_its_row_as_it_was(clicks: str, tmp_path: Path) -> None:
    """The proof takes the rows that were read least; that of padding is read never, and has no noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum", padding_idx=0), nn.Linear(4, 1), nn.Flatten(0))
    export_module(ready(model=model), tmp_path / "model", ledger=clicks, dataset="clicks", name="padded")
    table = load_module_release(tmp_path / "model").weights["0.weight"]
    assert not table[0].any()
    assert table[1:].any(dim=1).all()


def test_a_training_that_the_budget_does_not_admit_stays_private(clicks: str, tmp_path: Path) -> None:
    first, second = ready(), ready()
    export_module(first, tmp_path / "first", name="model", ledger=clicks, dataset="clicks")
    with pytest.raises(BudgetExceededError):
        export_module(second, tmp_path / "second", name="model", ledger=clicks, dataset="clicks")
    assert not (tmp_path / "second").exists()
    assert not second.closed
    assert charged(clicks) == pytest.approx(first.epsilon(1e-5))


def test_a_training_that_stopped_early_is_charged_for_all_its_steps(clicks: str, tmp_path: Path) -> None:
    trainer = ready(passes=1)
    release = export_module(trainer, tmp_path / "model", name="model", ledger=clicks, dataset="clicks")
    assert release.manifest.step == 4
    assert release.statement.steps == 8
    assert (release.statement.epsilon or 0) > trainer.epsilon(1e-5)


def test_nothing_is_visible_before_its_charge_and_the_same_call_finishes(
    clicks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = ready(dataset="clicks", ledger=clicks)
    seen = []
    commit = Ledger.commit

    def failing(self: Ledger, *arguments: Any, **named: Any) -> Any:
        seen.append((tmp_path / "model").exists())
        found = commit(self, *arguments, **named)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Ledger, "commit", failing)
    with pytest.raises(KeyboardInterrupt):
        export_module(trainer, tmp_path / "model", name="model")
    assert [path.name for path in tmp_path.iterdir() if "model" in path.name] == []
    assert not trainer.closed
    release = export_module(trainer, tmp_path / "model", name="model")
    assert seen == [False, False]
    with Ledger.open(clicks, read_only=True) as ledger:
        assert [entry.release for entry in ledger.releases()] == [release.manifest.version]


def test_a_second_model_under_one_charge_is_refused(clicks: str, tmp_path: Path) -> None:
    given = {"ledger": clicks, "dataset": "clicks", "run_id": "run-1"}
    export_module(ready(), tmp_path / "first", name="model", **given)
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        export_module(ready(), tmp_path / "second", name="model", **given)
    assert not (tmp_path / "second").exists()


def test_it_stays_with_its_ledger(clicks: str, tmp_path: Path) -> None:
    trainer = ready(dataset="clicks", ledger=clicks)
    with pytest.raises(InputError, match="reserved before its first step: leave out ledger"):
        export_module(trainer, tmp_path / "model", name="model", ledger=clicks, dataset="clicks")
    for path in tmp_path.glob("ledger.db*"):
        path.unlink()
    ledger_of_clicks(tmp_path)
    with pytest.raises(PrivacyError, match="another ledger"):
        export_module(trainer, tmp_path / "model", name="model")
    assert not (tmp_path / "model").exists()


# --- the gates -----------------------------------------------------------------------------------------------------


def test_a_flush_that_does_nothing_is_found_out(clicks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ready(dataset="clicks", ledger=clicks)

    def marks_the_rows() -> None:
        for table in trainer.trainer.tables._tables.values():
            table.last.fill_(trainer.steps_done)
        trainer.trainer.tables._has_pending_noise = False

    monkeypatch.setattr(trainer.trainer.tables, "flush", marks_the_rows)
    with pytest.raises(PendingNoiseError, match="nothing is released"):
        export_module(trainer, tmp_path / "model", name="model")
    assert charged(clicks) == 0.0


def set_nan(trainer: AccountedTrainer) -> None:
    trainer.model[1].weight.data[0, 0] = float("nan")  # type: ignore[index,union-attr]


def tune_on(trainer: AccountedTrainer) -> None:
    with torch.no_grad():
        trainer.model[1].weight.add_(1.0)  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [(set_nan, NonFiniteError, "not finite"), (tune_on, PrivacyError, "'1.weight' of the module was changed after")],
)
def test_weights_that_are_not_the_trainings_are_refused(
    change: Any, error: type[Exception], told: str, clicks: str, tmp_path: Path
) -> None:
    trainer = ready(dataset="clicks", ledger=clicks)
    change(trainer)
    with pytest.raises(error, match=told):
        export_module(trainer, tmp_path / "model", name="model")
    assert charged(clicks) == 0.0


@pytest.mark.parametrize(
    ("changes", "passes", "name", "told"),
    [
        ({}, 0, "model", "no step was done"),
        ({}, 1, "a model", "name must be letters"),
        ({"allow_moving_buffers": True}, 1, "model", "hold raw examples"),
    ],
)
def test_what_cannot_be_released_is_said_before_anything_is_reserved(
    changes: dict[str, Any], passes: int, name: str, told: str, clicks: str, tmp_path: Path
) -> None:
    trainer = ready(passes=passes, **changes)
    with pytest.raises((InputError, PrivacyError), match=told):
        export_module(trainer, tmp_path / "model", name=name, ledger=clicks, dataset="clicks")
    with Ledger.open(clicks, read_only=True) as ledger:
        assert ledger.show("clicks").charged_epsilon == 0.0


def test_a_test_key_makes_a_release_that_is_not_private(clicks: str, tmp_path: Path) -> None:
    trainer = ready(key=NoiseKey.for_tests(3), allow_unrepeatable_losses=True)
    release = export_module(trainer, tmp_path / "model", name="model", ledger=clicks, dataset="clicks")
    assert not release.statement.private
    assert release.statement.epsilon is None
    assert exporting.UNCHECKED in release.statement.not_covered
    with pytest.raises(NotPrivateError, match="noise key for tests"):
        load_module_release(tmp_path / "model")
