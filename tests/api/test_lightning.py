"""Lightning drives private steps: one pass a step, the same bits as the loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.accounted_trainer import AccountedTrainer
from lazydp.components.train.data.poisson_loader import PoissonLoader
from support.own_module import EPOCHS, losses_of, module, prepared, trained

pytest.importorskip("lightning", reason="needs the extra lightning")

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lazydp.api.lightning import PrivateModule

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, on workers and log folders


class Own(PrivateModule):
    """The small module; counts the forward passes of its training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: nn.Module = module()
        self.passes: list[int] = []
        self.validated: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.layers(ids)
        return found

    def losses(self, batch: Any) -> Tensor:
        self.passes.append(self.accounted.steps_done + 1)
        return losses_of(self.layers, batch[0])()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(float(self(batch[0]).sum()))


def private() -> tuple[Own, AccountedTrainer, PoissonLoader]:
    own = Own()
    accounted, batches = prepared(own)
    own.train_with(accounted)
    return own, accounted, batches


def lightning(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, max_epochs=EPOCHS, **{**quiet, **options})


def test_lightning_does_the_steps_of_the_loop_by_hand(tmp_path: Path) -> None:
    own, accounted, batches = private()
    trainer = lightning(tmp_path)
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


def test_what_lightning_cannot_do_privately_is_refused(tmp_path: Path) -> None:
    own, _, batches = private()
    with pytest.raises(InputError, match="float32, and this Trainer has precision bf16-mixed"):
        lightning(tmp_path, precision="bf16-mixed").fit(own, batches)
    with pytest.raises(InputError, match="has no private trainer"):
        lightning(tmp_path).fit(Own(), DataLoader(TensorDataset(torch.zeros(2))))
    with pytest.raises(InputError, match="another module"):
        Own().train_with(own.accounted)
    with pytest.raises(NotImplementedError, match="defines no losses"):
        PrivateModule().losses(None)
