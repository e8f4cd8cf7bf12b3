"""The small module under Lightning's trainer. Import it in tests, not beside them: Lightning takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lazydp.api.lightning import PrivateModule
from lazydp.components.train.accounted_trainer import AccountedTrainer
from lazydp.components.train.data.poisson_loader import PoissonLoader
from support.own_module import EPOCHS, losses_of, module, prepared


class Own(PrivateModule):
    """The small module; counts the forward passes of its training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: nn.Module = module()
        self.passes: list[int] = []
        self.validated: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        found: Tensor = self.layers(ids)
        return found

    def losses(self, batch: Any) -> Tensor:
        """One for each example."""
        self.passes.append(self.accounted.steps_done + 1)
        return losses_of(self.layers, batch[0])()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keeps the sum of the logits."""
        self.validated.append(float(self(batch[0]).sum()))


def private() -> tuple[Own, AccountedTrainer, PoissonLoader]:
    """The module, its private trainer, and its batches."""
    own = Own()
    accounted, batches = prepared(own)
    own.train_with(accounted)
    return own, accounted, batches


def lightning(folder: Path, **options: Any) -> Trainer:
    """Lightning's trainer, which prints nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, max_epochs=EPOCHS, **{**quiet, **options})
