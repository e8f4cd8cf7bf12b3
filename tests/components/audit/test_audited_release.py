"""A release carries the audit of its own run, and no other."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lazydp.components.audit.audit import audit
from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.bundle.reader import Bundle
from lazydp.components.export.export import export
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.train import train
from lazydp.kernels.noise_key import NoiseKey


def test_the_statement_of_a_release_carries_its_audit(
    dataset: Path, configured: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = configured(steps=2, expected_batch_size=100, popularity={"noise_multiplier": 10.0})
    ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
    data = EncodedDataset.open(dataset)
    with Ledger.open(ledger) as opened:
        known = register(opened, fingerprint=data.manifest.fingerprint, name=data.spec.name)
        opened.set_budget(known.identifier, epsilon=10.0, delta=1e-5)
    run = train(dataset=dataset, config=config, out=tmp_path / "run", ledger=ledger)
    found = audit(dataset=dataset, config=config, canaries=200, key=NoiseKey.for_tests(0))
    found.write(tmp_path / "audit")
    other = audit(dataset=dataset, config=configured(steps=3), canaries=200, key=NoiseKey.for_tests(0))
    other.write(tmp_path / "other")

    def release(report: str) -> BundleManifest:
        return export(run=run.folder, dataset=dataset, out=tmp_path / "bundle", ledger=ledger, audit=tmp_path / report)

    with pytest.raises(InputError, match="another configuration"):
        release("other")
    assert not (tmp_path / "bundle").exists()
    release("audit")
    statement = Bundle.open(tmp_path / "bundle").statement
    assert statement.audit is not None
    assert statement.audit.epsilon_lower_bound == found.report.epsilon_lower_bound
    assert statement.audit.confidence == 0.95
    # Canaries show nothing of the counts, so the claim that they face is that of training.
    assert statement.popularity is not None
    assert found.report.epsilon_claimed == statement.popularity.epsilon_without
    assert found.report.epsilon_claimed < statement.epsilon  # type: ignore[operator]
    with Ledger.open(ledger) as opened:
        runs = opened.state().runs
    # The audit trained too, and released nothing.
    assert list(runs) == [run.identity.run_id]
