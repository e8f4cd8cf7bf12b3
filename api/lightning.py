"""Private training under Lightning's `Trainer`, for `pip install lazydp[lightning]`.

    class Clicks(PrivateModule):
        def losses(self, batch):                       # one loss an example, [B]
            ids, labels = batch
            return self.criterion(self(ids), labels)

    module = Clicks()
    accounted, batches = make_private_with_epsilon(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=loader, ...)
    module.train_with(accounted)
    lightning.pytorch.Trainer(max_epochs=3).fit(module, batches)

Lightning's automatic optimization wants one loss for a batch and runs the backward pass itself: per-example norms would
then take a second pass. So the module optimizes manually, and its one optimizer is the trainer's step. Lightning counts
steps, moves batches, logs, validates and writes checkpoints as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lazydp.components.shared.errors import InputError
from lazydp.components.train.accounted_trainer import AccountedTrainer


class PrivateModule(LightningModule):
    """A `LightningModule` whose training step is a private step. Define `losses`; leave `training_step` as it is.

    Pending noise is applied before each validation, test and prediction, and at the end of each epoch, so that these
    read whole weights, and so does a checkpoint of an epoch. Within an epoch a checkpoint is refused while noise is
    pending. Lightning's checkpoints are private: beside the weights they hold the state of the trainer.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.automatic_optimization = False
        self._accounted: AccountedTrainer | None = None

    def losses(self, batch: Any) -> Tensor:
        """The loss of each example of a batch, [B], without a reduction."""
        raise NotImplementedError(f"{type(self).__name__} defines no losses(batch): one loss an example, [B]")

    def train_with(self, accounted: AccountedTrainer) -> None:
        """Train with what `make_private_with_epsilon` gave for this module.

        Raises:
            InputError: the trainer is of another module.
        """
        if accounted.model is not self:
            raise InputError("the trainer is of another module: give this one to make_private_with_epsilon")
        self._accounted = accounted

    @property
    def accounted(self) -> AccountedTrainer:
        """The trainer of the private steps.

        Raises:
            InputError: there is none yet.
        """
        if self._accounted is None:
            raise InputError(
                "the module has no private trainer: prepare it with make_private_with_epsilon, and call train_with "
                "before fit"
            )
        return self._accounted

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The private step as the one optimizer. Schedulers of the trainer's optimizer are stepped by the caller."""
        return _PrivateSteps(self.accounted)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One private step. It logs nothing: losses are private."""
        optimizer: Any = self.optimizers()
        optimizer.step(closure=lambda: self.losses(batch))

    def on_fit_start(self) -> None:
        """Refuse what has no private step.

        Raises:
            InputError: several processes, or another precision than float32.
        """
        if self.trainer.world_size > 1:
            raise InputError(
                f"private steps run in one process, and this Trainer has {self.trainer.world_size}: give devices=1"
            )
        if self.trainer.precision != "32-true":
            raise InputError(
                f"private steps compute in float32, and this Trainer has precision {self.trainer.precision}: leave "
                "precision out"
            )

    def cpu(self) -> Self:
        """Stay where the trainer keeps the weights, though Lightning moves a module to the host when it is done."""
        return self if self._accounted is not None else super().cpu()

    def on_train_epoch_end(self) -> None:
        """Apply all pending noise."""
        self.accounted.flush()

    def on_validation_start(self) -> None:
        """Apply all pending noise."""
        self._flush_if_private()

    def on_test_start(self) -> None:
        """Apply all pending noise."""
        self._flush_if_private()

    def on_predict_start(self) -> None:
        """Apply all pending noise."""
        self._flush_if_private()

    def _flush_if_private(self) -> None:
        if self._accounted is not None and not self._accounted.closed:
            self._accounted.flush()


class _PrivateSteps(torch.optim.Optimizer):
    """The steps of a trainer, as Lightning's loops drive an optimizer. It has no parameters of its own to look at."""

    def __init__(self, accounted: AccountedTrainer) -> None:
        super().__init__([torch.zeros(0)], {})
        self._accounted = accounted

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One private step; `closure` gives the losses."""
        if closure is None:
            raise InputError("a private step needs the losses: self.optimizers().step(closure=...)")
        return self._accounted.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Of the trainer; private."""
        return self._accounted.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Into the trainer."""
        self._accounted.load_state_dict(state_dict)
