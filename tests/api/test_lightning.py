"""Lightning drives private steps: one pass a step, the same bits as the loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lazydp.components.shared.errors import InputError
from support.own_module import module, prepared, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, on workers and log folders


@pytest.fixture(name="own_lightning")
def _own_lightning() -> Any:
    """The module under Lightning."""
    pytest.importorskip("lightning", reason="needs the extra lightning")
    from support import own_lightning_module

    return own_lightning_module


def test_lightning_does_the_steps_of_the_loop_by_hand(own_lightning: Any, tmp_path: Path) -> None:
    own, accounted, batches = own_lightning.private()
    trainer = own_lightning.lightning(tmp_path)
    ids = torch.zeros(4, 3, dtype=torch.int64)
    trainer.fit(own, batches, DataLoader(TensorDataset(ids), batch_size=2))
    by_hand = module()
    other, loader = prepared(by_hand)
    sizes = [len(members) for members in trained(other, loader)]
    other.flush()
    assert trainer.global_step == accounted.steps_done == len(sizes)
    for name, value in by_hand.state_dict().items():
        assert torch.equal(own.layers.state_dict()[name], value), name
    assert accounted.pending() == 0
    assert own.validated
    # Five calls in each of the first three steps, which look for coupled losses; then one pass a step.
    assert [own.passes.count(step) for step in range(1, len(sizes) + 1)] == [5, 5, 5, *[1] * (len(sizes) - 3)]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=False)
    assert torch.equal(saved["state_dict"]["layers.0.weight"], own.layers.state_dict()["0.weight"])
    assert 1.99 < accounted.epsilon(1e-5) <= 2.0


def test_what_lightning_cannot_do_privately_is_refused(own_lightning: Any, tmp_path: Path) -> None:
    own, _, batches = own_lightning.private()
    with pytest.raises(InputError, match="float32, and this Trainer has precision bf16-mixed"):
        own_lightning.lightning(tmp_path, precision="bf16-mixed").fit(own, batches)
    with pytest.raises(InputError, match="has no private trainer"):
        own_lightning.lightning(tmp_path).fit(own_lightning.Own(), DataLoader(TensorDataset(torch.zeros(2))))
    with pytest.raises(InputError, match="another module"):
        own_lightning.Own().train_with(own.accounted)
    with pytest.raises(NotImplementedError, match="defines no losses"):
        own_lightning.PrivateModule().losses(None)
