"""Whole privacy profiles, calibration at its ends, and what of compositions is kept."""

import importlib.metadata
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.special import log_ndtr

from lazydp.components.budget.accounting import loss_store
from lazydp.components.budget.accounting.epsilon import calibrate_noise_multiplier, epsilon, privacy_profile
from lazydp.components.budget.accounting.events import (
    composed,
    event_from_json,
    event_to_json,
    repeated,
    tuning_event,
)
from lazydp.components.budget.accounting.loss_store import LossStore
from lazydp.components.shared.errors import FormatError, InputError, PrivacyError


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """The exact delta of one Gaussian mechanism (Balle and Wang, arXiv 1805.06530)."""
    a, b = 0.5 / noise_multiplier, epsilon * noise_multiplier
    return math.exp(log_ndtr(a - b)) - math.exp(epsilon + log_ndtr(-a - b))


def test_what_another_version_of_the_library_composed_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    store, leaves = LossStore(None), (("a", 1),)
    store.put(leaves, 1e-4, loss_store.Kept(pld.from_laplace_mechanism(1.0), 0.0))
    assert store.find(leaves, 1e-4)[1] is not None
    monkeypatch.setattr(loss_store, "_accounting_version", lambda: "0.0.1")
    assert store.find(leaves, 1e-4) == (leaves, None)
    monkeypatch.undo()
    assert loss_store._accounting_version() == importlib.metadata.version("dp-accounting")


def test_memory_and_folder_hold_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = pld.from_laplace_mechanism(1.0, value_discretization_interval=0.1)
    size = loss_store._size(distribution)
    monkeypatch.setattr(loss_store, "_MEMORY_BYTES", 3 * size)
    store = LossStore(None)
    for name in "abc":
        store.put(((name, 1),), 1e-4, loss_store.Kept(distribution, 0.0))
    store.put((("a", 1),), 1e-4, loss_store.Kept(distribution, 0.0))  # not twice
    assert [store.find(((name, 1),), 1e-4)[1] is not None for name in "bca"] == [True] * 3
    store.put((("d", 1),), 1e-4, loss_store.Kept(distribution, 0.0))
    assert [store.find(((name, 1),), 1e-4)[1] is not None for name in "bcad"] == [False, True, True, True]
    kept = loss_store.Kept(distribution, 9.0)
    LossStore(tmp_path / "new" / "folder").put((("a", 1),), 1e-4, kept)
    assert LossStore(tmp_path / "new" / "folder").find((("a", 1),), 1e-4)[1] is not None
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o777 == 0o700
    shutil.rmtree(tmp_path / "new")
    for age, name in enumerate(("old", "middle", "new")):
        (tmp_path / f"{name}.npz").write_bytes(b"0" * 100)
        os.utime(tmp_path / f"{name}.npz", (age, age))
    monkeypatch.setattr(loss_store, "_FOLDER_BYTES", 300)
    loss_store._make_room(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(loss_store, "_FOLDER_BYTES", 299)
    loss_store._make_room(tmp_path)
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["middle", "new"]


def test_a_profile_is_that_of_the_gaussian_and_of_what_tells_nothing_or_everything() -> None:
    epsilons = np.array([0.0, 0.5, 1.0, 3.0])
    found = privacy_profile(composed([dp_event.GaussianDpEvent(2.0), dp_event.GaussianDpEvent(2.0)]), epsilons)
    true = np.array([gaussian_delta(math.sqrt(2), epsilon) for epsilon in epsilons])
    assert np.all(found >= true - 1e-12)
    assert found == pytest.approx(true, rel=2e-2)
    assert privacy_profile(dp_event.NoOpDpEvent(), epsilons).tolist() == [0.0] * 4
    assert privacy_profile(dp_event.NonPrivateDpEvent(), epsilons).tolist() == [1.0] * 4
    # Losses that the coarse grid would not hold.
    assert privacy_profile(dp_event.GaussianDpEvent(0.02), np.array([1.0]))[0] == pytest.approx(1.0, abs=1e-9)
    for event, error in (
        (tuning_event(dp_event.GaussianDpEvent(1.0), mean_trials=2, shape=1.0), PrivacyError),
        (dp_event.GaussianDpEvent(-1.0), InputError),
        (dp_event.UnsupportedDpEvent(), PrivacyError),
    ):
        with pytest.raises(error):
            privacy_profile(event, epsilons)


@pytest.mark.parametrize("target", [1e-3, 0.02])
def test_calibration_for_a_small_target_finds_plenty_of_noise(target: float) -> None:
    found = calibrate_noise_multiplier(target_epsilon=target, target_delta=1e-5, make_event=dp_event.GaussianDpEvent)
    assert gaussian_delta(found, target) <= 1e-5 < gaussian_delta(found * 0.995, target)


def test_a_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(InputError, match="no noise_multiplier up to 1e"):
        calibrate_noise_multiplier(
            target_epsilon=0.5, target_delta=1e-5, make_event=lambda _: dp_event.GaussianDpEvent(1.0)
        )


def test_repeated_compositions_are_taken_apart() -> None:
    both = composed([dp_event.GaussianDpEvent(8.0), dp_event.LaplaceDpEvent(20.0)])
    by_hand = composed([dp_event.GaussianDpEvent(8.0 / 6**0.5), repeated(dp_event.LaplaceDpEvent(20.0), 6)])
    nested = dp_event.SelfComposedDpEvent(dp_event.SelfComposedDpEvent(both, 2), 3)
    assert epsilon(nested, delta=1e-5) == pytest.approx(epsilon(by_hand, delta=1e-5), rel=1e-6)


@pytest.mark.parametrize(
    ("event", "field", "wrong"),
    [
        (tuning_event(dp_event.GaussianDpEvent(1.0), mean_trials=1.0, shape=1.0), "mean", 0.99),
        (dp_event.DiscreteLaplaceDpEvent(1.0, 1), "sensitivity", 0),
        (dp_event.SelfComposedDpEvent(dp_event.LaplaceDpEvent(1.0), 0), "count", -1),
    ],
)
def test_the_least_of_a_number_is_read_back(event: DpEvent, field: str, wrong: float) -> None:
    document = event_to_json(event)
    assert event_from_json(document) == event
    with pytest.raises(FormatError, match=field):
        event_from_json({**document, field: wrong})
