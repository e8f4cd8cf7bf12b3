"""What `make_private_with_epsilon` gives: a private trainer that knows its epsilon and its key."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.shared.errors import InputError, PrivacyError
from lazydp.components.train.callers_optimizer import GroupRates
from lazydp.components.train.charge import Claim, Mechanism
from lazydp.components.train.data.poisson_loader import PoissonLoader
from lazydp.components.train.data.sampler import PoissonSampler
from lazydp.components.train.engine.report import StepReport
from lazydp.components.train.private_trainer import Losses, PrivateTrainer
from lazydp.kernels.noise_key import NoiseKey

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class TrainingKey:
    """The key of one training: noise and sampling are drawn under keys derived from it.

    Args:
        root: the caller's key, which stays the caller's; None for a new one, which nobody else has.
        nonce: of a training that goes on; None for a new one.
    """

    def __init__(self, root: NoiseKey | None, nonce: bytes | None = None) -> None:
        # What is destroyed at the end is the training's own, so that a caller's key may serve others.
        made = NoiseKey.generate() if root is None else root
        self.nonce = made.new_nonce() if nonce is None else nonce
        self.key = made.derive(f"training {self.nonce.hex()}")
        if root is None:
            made.destroy()
        self.commitment = self.key.commitment()
        """What the ledger is told of it."""

    def destroy(self) -> None:
        """Nothing can be drawn under it any more."""
        self.key.destroy()


class AccountedTrainer:
    """Trains what `make_private_with_epsilon` prepared; see there. A context manager: its end is `close`.

    Attributes:
        model: the module, trained in place.
        mechanism: what all steps are, for the accountant.
        optimizer: the caller's, of all parameters but the embedding tables; schedulers may be attached to it.
        claim: the reservation in a ledger; None where there is none yet.
    """

    def __init__(
        self,
        trainer: PrivateTrainer,
        *,
        loader: PoissonLoader,
        key: TrainingKey,
        mechanism: Mechanism,
        optimizer: torch.optim.Optimizer,
        rates: GroupRates | None,
        claim: Claim | None,
    ) -> None:
        self.model: nn.Module = trainer.model
        self.mechanism = mechanism
        self.optimizer = optimizer
        self.claim = claim
        self.trainer = trainer
        """The steps, without the accounting: for the export."""
        self.key = key
        """Private: whoever has it can subtract the noise."""
        self._rates = rates
        self._loader = loader
        self._closed = False
        self._finalizer = weakref.finalize(self, _destroy, key, loader.sampler)
        self._versions = self._tensor_versions()

    @property
    def steps_done(self) -> int:
        """Steps completed."""
        return self.trainer.steps_done

    @property
    def steps(self) -> int:
        """T, the number of steps that the noise was calibrated for."""
        return self.mechanism.steps

    @property
    def closed(self) -> bool:
        """Whether the key is gone, and with it every further step."""
        return self._closed

    def event(self) -> DpEvent:
        """What the steps done so far are, for the accountant."""
        return self.mechanism.event(self.steps_done)

    def epsilon(self, delta: float) -> float:
        """The epsilon that the steps done so far have spent, at `delta`, per example.

        Raises:
            InputError: delta out of range.
        """
        return epsilon(self.event(), delta=delta)

    def step(self, *micro_batches: Losses) -> StepReport:
        """Do the step of the batch that the loader gave last.

        Args:
            micro_batches: as for `PrivateTrainer.step`: functions that give the loss of each example of the batch, [B],
                without a reduction; all of them together have one loss for each example of the batch. For an empty
                draw none is called: the step is noise alone, and it counts.

        Raises:
            InputError: no batch was taken from the loader for this step, or losses that are not one an example of it,
                or what `PrivateTrainer.step` refuses. Nothing has changed then.
            BudgetExceededError: all steps were done.
            PrivacyError: the trainer was closed.
        """
        self.refuse_closed()
        self.trainer.refuse_step_beyond_the_last()
        step = self.steps_done + 1
        size = self._loader.size_of(step)
        if not micro_batches:
            raise InputError("trainer.step needs a function that gives the losses; for an empty draw it is not called")
        if self._rates is not None:
            self._rates.take(step)
        report = self.trainer.step(*(_counted(micro_batches, size) if size else ()))
        self._versions = self._tensor_versions()
        return report

    def flush(self) -> None:
        """Apply all pending noise: before the model is evaluated. Training may go on.

        Raises:
            UnfinishedStepError: a step was interrupted while it changed the weights.
        """
        self.trainer.flush()

    def pending(self) -> int:
        """Number of rows with pending noise."""
        return self.trainer.pending()

    def close(self) -> None:
        """Apply all pending noise and destroy the key: the model is what it is from now on. Repeated, it does nothing.

        Raises:
            UnfinishedStepError: a step was interrupted while it changed the weights; the key is gone all the same.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.trainer.flush()
        finally:
            self._finalizer()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a private checkpoint needs beside the caller's key, as `PrivateTrainer.state_dict`.

        To go on in another process give it to `make_private_with_epsilon` as `state`, with the same `key`.

        Raises:
            UnfinishedStepError: a step was interrupted while it changed the weights.
        """
        return {
            "training": self.key.nonce.hex(),
            "rates": None if self._rates is None else self._rates.past[: self.steps_done],
            "trainer": self.trainer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state of this training, also after an interrupted step. The loader goes on from there.

        Raises:
            PrivacyError: the state is of another training, whose noise has another key.
            FormatError: the state belongs to another model or optimizer.
        """
        self.refuse_closed()
        if state["training"] != self.key.nonce.hex():
            raise PrivacyError(
                "the state is of another training, with another key: give it to make_private_with_epsilon as state=, "
                "together with the key that it was trained under"
            )
        self.trainer.load_state_dict(state["trainer"])
        if self._rates is not None:
            self._rates.past = list(state["rates"] or [])
        self._versions = self._tensor_versions()

    def refuse_closed(self) -> None:
        """Refuse to go on without a key.

        Raises:
            PrivacyError: the trainer was closed.
        """
        if self._closed:
            raise PrivacyError(
                "the trainer was closed, and its key destroyed: the model can be used, and no step follows; train anew "
                "with make_private_with_epsilon"
            )

    def refuse_changed(self) -> None:
        """Refuse a module that something else changed after its last step, as far as torch records it.

        Raises:
            PrivacyError: names the parameter or buffer.
        """
        for name, version in self._tensor_versions().items():
            if self._versions.get(name) != version:
                raise PrivacyError(
                    f"{name!r} of the module was changed after the last step, by something else than the trainer: no "
                    "epsilon covers what was not trained privately; load_state_dict of an earlier state brings it back"
                )

    def _tensor_versions(self) -> dict[str, tuple[int, int]]:
        """Which tensor each parameter and buffer is, and how often it was changed; the tables are the trainer's own."""
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: (id(tensor), tensor._version) for name, tensor in tensors}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _destroy(key: TrainingKey, sampler: PoissonSampler) -> None:
    key.destroy()
    sampler.destroy()


def _counted(micro_batches: tuple[Losses, ...], size: int) -> list[Callable[[], Tensor]]:
    """The same functions, which refuse losses that are not one an example of the batch of `size`.

    What is clipped is the gradient of one loss, and what is sampled is one example: more losses than examples would be
    a unit that contributes several times.
    """
    found: dict[int, int] = {}

    def counted(number: int, losses_of: Losses) -> Tensor:
        losses = losses_of()
        found[number] = losses.shape[0] if losses.dim() else 1
        if len(found) == len(micro_batches) and sum(found.values()) != size:
            raise InputError(
                f"the batch has {size} examples, and the step has {sum(found.values())} losses: give one loss for each "
                "example of the batch (an example of several positions: the sum over them; one to be left out: 0 times "
                "its loss)"
            )
        return losses

    return [lambda number=number, of=of: counted(number, of) for number, of in enumerate(micro_batches)]  # type: ignore[misc]
