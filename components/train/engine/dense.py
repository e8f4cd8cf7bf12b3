"""The dense layers in training: their gradients, the noise on these gradients, and the optimizer."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import FormatError, InputError, NonFiniteError
from lazydp.components.shared.noise_addresses import FIRST_RESERVED, MAX_TABLES
from lazydp.components.train.device.placement import CPU
from lazydp.components.train.mechanism.double_sums import DoubleSums, LaneSums
from lazydp.components.train.mechanism.unit_order import UnitOrder
from lazydp.components.train.ranks.ranks import Ranks, tree_sum
from lazydp.components.train.tables.skip_ahead import Schedule
from lazydp.kernels import ops, products
from lazydp.kernels.arguments import Distribution
from lazydp.kernels.noise_key import NoiseKey

_MAX_PARAMETERS = FIRST_RESERVED - MAX_TABLES


@dataclass(frozen=True, slots=True)
class DenseOptimizer:
    """How to build the optimizer of the dense layers.

    The optimizer may be any that takes dense gradients and needs no closure. It sees gradients after clipping and noise
    only, so it costs no privacy.

    Attributes:
        make: builds the optimizer for given parameters.
        learning_rate: schedule, step (1, 2, ...) -> rate. It sets the rate of every parameter group at each step. None:
            the rate stays as `make` set it.
    """

    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    learning_rate: Schedule | None = None

    @classmethod
    def named(cls, name: str, *, learning_rate: Schedule | float, **options: Any) -> DenseOptimizer:
        """The optimizer of `torch.optim` that is called `name`.

        Args:
            name: for example `adam`; upper and lower case are the same.
            learning_rate: a rate, or a schedule, step (1, 2, ...) -> rate.
            options: further arguments of the optimizer.

        Raises:
            InputError: `torch.optim` has no such optimizer, or it is LBFGS, which needs a closure, or SparseAdam, which
                needs sparse gradients.
        """
        known: dict[str, Callable[..., torch.optim.Optimizer]] = {
            key.lower(): value
            for key, value in vars(torch.optim).items()
            if inspect.isclass(value)
            and issubclass(value, torch.optim.Optimizer)
            and value not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
        }
        found = known.get(name.lower())
        if found is None:
            raise InputError(f"no dense optimizer is called {name!r}: choose one of {', '.join(sorted(known))}")
        schedule = learning_rate if callable(learning_rate) else None
        first = learning_rate(1) if callable(learning_rate) else learning_rate
        return cls(lambda parameters: found(parameters, lr=first, **options), schedule)


class DenseLayers:
    """The trained dense parameters of a model, in the order of `model.named_parameters()`.

    The noise of parameter i has table number 0x8000 + i in its address. So a checkpoint fits only a model with the same
    order of parameters. All parameters must be on one device, and must stay there.

    Args:
        model: its parameters that require a gradient are trained, in place.
        optimizer: builds their optimizer.
        noise_scale: standard deviation of the noise on each coordinate of a gradient: sigma C / b, or with a clipping
            norm for each group sigma sqrt(2) C_dense / b; 0 for no noise.
        key: the noise key; may be None if `noise_scale` is 0 or `noise` is `ones`.
        noise: `gaussian`; or `ones`, which replaces every Gaussian number by 1, for tests.
        private: gradients come as float64 `sums`; otherwise autograd adds them to `.grad`.

    Raises:
        InputError: more parameters than there are table numbers for them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: DenseOptimizer,
        noise_scale: float,
        key: NoiseKey | None,
        noise: Distribution = "gaussian",
        private: bool = True,
    ) -> None:
        self._private = private
        self._model = model
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if len(self._parameters) > _MAX_PARAMETERS:
            raise InputError(
                f"a model may have at most {_MAX_PARAMETERS} trained dense parameters, because each needs a noise "
                f"address; found {len(self._parameters)}: freeze some (requires_grad_(False)) or use fewer layers"
            )
        self._learning_rate = optimizer.learning_rate
        self._optimizer = optimizer.make(self._parameters.values()) if self._parameters else None
        self._noise_scale = noise_scale
        self._key = key
        self._noise = noise
        self._lanes = LaneSums()
        self.order = UnitOrder(key)
        """The order in which the units of a step are added up."""
        largest = max((p.numel() for p in self._parameters.values()), default=0)
        # One buffer holds the noise of each parameter in turn, so a step allocates no new buffer for noise.
        device = next((parameter.device for parameter in self._parameters.values()), CPU)
        self._buffer = torch.empty(largest if noise_scale else 0, device=device)
        self.begin_step(0)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The `torch.optim` optimizer; None if the model has no dense parameters. A scheduler may change its rate."""
        return self._optimizer

    @property
    def sums(self) -> DoubleSums:
        """The clipped gradient sums of the present lane, or after the last one of the step.

        `add_noise` adds the noise, and rounds the result to `.grad`.
        """
        return self._lanes.current

    def draw_under(self, key: NoiseKey) -> None:
        """Use the noise key `key` from now on."""
        self._key = key
        self.order.draw_under(key)

    def begin_step(self, step: int, *, exchanges: int = 1) -> None:
        """Set all sums to zero for `step`.

        Args:
            step: its number.
            exchanges: see `UnitOrder.begin`.
        """
        self._lanes.clear()
        self.order.begin(step, exchanges=exchanges)
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not self._private:
                parameter.grad.zero_()

    def begin_lane(self, lane: int, *, first: bool) -> None:
        """What is added from here on belongs to `lane`; `first` is that of this rank."""
        self.order.begin_lane(lane)
        if not first:
            self._lanes.begin_lane()

    def end_lane(self) -> None:
        """The present lane is complete."""
        self._lanes.end_lane()

    def sum_over(self, ranks: Ranks) -> None:
        """Add the sums of all ranks, each with its lanes of the step; every rank then has the sums of all lanes."""
        if ranks.size == 1:
            return
        sums = [self._summed(parameter) for parameter in self._parameters.values()]
        total = tree_sum(ranks, torch.cat([of.view(-1) for of in sums]), purpose="dense sums")
        for of, part in zip(sums, torch.split(total, [of.numel() for of in sums]), strict=True):
            of.copy_(part.view(of.shape))

    def digest(self) -> Tensor:
        """SHA-256 of all parameters, uint8 [32]: what ranks compare."""
        found = hashlib.sha256()
        for parameter in self._parameters.values():
            found.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)

    def add_noise(self, step: int) -> None:
        """Write the gradients of a private step to `.grad`: the sums with noise, then rounded to float32."""
        if not self._private:
            return
        for number, parameter in enumerate(self._parameters.values()):
            gradient, total = _gradient(parameter), self._summed(parameter)
            noise = self._noise_of(number, parameter, step) if self._noise_scale else None
            if total.is_cpu and gradient.is_contiguous() and gradient.dtype == torch.float32:
                flat = None if noise is None else noise.view(-1)
                products.noised_sum_(gradient.view(-1), total.view(-1), flat, scale=self._noise_scale)
            else:
                gradient.copy_(total if noise is None else total.add_(noise, alpha=self._noise_scale))

    def _summed(self, parameter: nn.Parameter) -> Tensor:
        """The sum of the step, float64; zeros where no micro-batch reached the parameter."""
        total = self.sums.used(parameter)
        return self.sums.of(parameter) if total is None else total

    def _noise_of(self, number: int, parameter: Tensor, step: int) -> Tensor:
        """Noise of the parameter's shape, float32. The next call overwrites it."""
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        noise = self._buffer[: parameter.numel()].view(rows, -1)
        if self._noise == "ones":
            noise.fill_(1.0)
        else:
            assert self._key is not None
            ops.normal_(noise, self._key.tensor(), table=MAX_TABLES + number, first_row=0, step=step)
        return noise.view(parameter.shape)

    def set_rate(self, step: int) -> None:
        """Give the optimizer the learning rate of `step`, if there is a schedule; no weight changes.

        Raises:
            InputError: the schedule does not cover the step.
        """
        if self._optimizer is None or self._learning_rate is None:
            return
        rate = self._learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def update(self) -> None:
        """Let the optimizer update the parameters, at the rate that `set_rate` gave it."""
        if self._optimizer is not None:
            self._optimizer.step()

    def check_finite(self) -> None:
        """Check every value of every parameter.

        Raises:
            NonFiniteError: a value is infinite or not a number; the message names the parameter.
        """
        for name, parameter in self._parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"dense parameter {name!r} holds values that are not finite: the run diverged; "
                    "train again with a lower learning rate"
                )

    def state_dict(self) -> dict[str, Any]:
        """The parameters, the buffers and the state of the optimizer, not copied, for a private checkpoint."""
        optimizer = {} if self._optimizer is None else self._optimizer.state_dict()
        return {"model": self._model.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state`, which `state_dict` gave, into the model and the optimizer.

        Raises:
            FormatError: `state` belongs to another model or optimizer.
        """
        try:
            self._model.load_state_dict(state["model"])
            if self._optimizer is not None:
                # torch keeps the tensors that it is given, and later steps change them. So it gets copies.
                self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        except (RuntimeError, ValueError, KeyError) as error:
            raise FormatError(
                "the checkpoint's dense layers belong to another model or optimizer; resume with those that the run "
                f"began with: {error}"
            ) from error


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
