"""The dense layers in training: their gradient buffers, the noise on them, and any `torch.optim` optimizer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import FormatError, InputError, NonFiniteError
from lazydp.components.shared.noise_addresses import FIRST_RESERVED, MAX_TABLES
from lazydp.components.train.device.placement import CPU
from lazydp.components.train.mechanism.double_sums import DoubleSums
from lazydp.components.train.mechanism.unit_order import UnitOrder
from lazydp.components.train.tables.skip_ahead import Schedule
from lazydp.kernels import ops, products
from lazydp.kernels.arguments import Distribution
from lazydp.kernels.noise_key import NoiseKey

_MAX_PARAMETERS = FIRST_RESERVED - MAX_TABLES


@dataclass(frozen=True, slots=True)
class DenseOptimizer:
    """The optimizer of the dense layers. Any will do, since it sees privatised gradients only.

    Attributes:
        make: builds the optimizer for given parameters.
        learning_rate: schedule that sets the rate of every parameter group at each step; None leaves it to `make`.
    """

    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    learning_rate: Schedule | None = None

    @classmethod
    def named(cls, name: str, *, learning_rate: Schedule | float, **options: Any) -> DenseOptimizer:
        """The optimizer of `torch.optim` called `name` (any case), with its options.

        Args:
            name: such as `adam`.
            learning_rate: rate, or a schedule: step (1, 2, ...) -> rate.
            options: further arguments of the optimizer.

        Raises:
            InputError: there is no such optimizer, or it does not work with dense gradients alone (LBFGS, SparseAdam).
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
            raise InputError(f"no dense optimizer {name!r}: choose one of {', '.join(sorted(known))}")
        schedule = learning_rate if callable(learning_rate) else None
        first = learning_rate(1) if callable(learning_rate) else learning_rate
        return cls(lambda parameters: found(parameters, lr=first, **options), schedule)


class DenseLayers:
    """The trained dense parameters of a model, in their fixed order.

    Parameter i draws its noise under table number 0x8000 + i. So a checkpoint fits only a model with the same order of
    `model.named_parameters()`. All parameters are on one device, and stay there.

    Args:
        model: whose parameters are trained.
        optimizer: of the parameters.
        noise_scale: standard deviation of the noise on gradients; 0 for none.
        key: noise key; None where there is no noise.
        noise: `gaussian`, or `ones` for tests.
        private: gradients come as float64 `sums`; else autograd adds them to `.grad`.

    Raises:
        InputError: too many parameters to address.
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
                f"at most {_MAX_PARAMETERS} dense parameters have addresses, found {len(self._parameters)}"
            )
        self._learning_rate = optimizer.learning_rate
        self._optimizer = optimizer.make(self._parameters.values()) if self._parameters else None
        self._noise_scale = noise_scale
        self._key = key
        self._noise = noise
        self.sums = DoubleSums()
        """Clipped gradient sums of a step; `add_noise` rounds them to `.grad`."""
        self.order = UnitOrder(key)
        """In which the units of a step are added up."""
        largest = max((p.numel() for p in self._parameters.values()), default=0)
        # One buffer, used for the noise of every parameter in turn: a step allocates no memory.
        device = next((parameter.device for parameter in self._parameters.values()), CPU)
        self._buffer = torch.empty(largest if noise_scale else 0, device=device)
        self.begin_step(0)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The `torch.optim` optimizer, so that a scheduler can change its rate; None without dense parameters."""
        return self._optimizer

    def draw_under(self, key: NoiseKey) -> None:
        """Draw noise under `key` from now on."""
        self._key = key
        self.order.draw_under(key)

    def begin_step(self, step: int, *, exchanges: int = 1) -> None:
        """Set all sums to zero for `step`.

        Args:
            step: its number.
            exchanges: see `UnitOrder.begin`.
        """
        self.sums.clear()
        self.order.begin(step, exchanges=exchanges)
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not self._private:
                parameter.grad.zero_()

    def add_noise(self, step: int) -> None:
        """The gradients of a private step: the sums with the noise of `step`, rounded to float32 after it is added."""
        if not self._private:
            return
        for number, parameter in enumerate(self._parameters.values()):
            gradient, total = _gradient(parameter), self.sums.used(parameter)
            if total is None:  # no micro-batch, or none that reached the parameter
                total = self.sums.of(parameter)
            noise = self._noise_of(number, parameter, step) if self._noise_scale else None
            if total.is_cpu and gradient.is_contiguous():
                flat = None if noise is None else noise.view(-1)
                products.noised_sum_(gradient.view(-1), total.view(-1), flat, scale=self._noise_scale)
            else:
                gradient.copy_(total if noise is None else total.add_(noise, alpha=self._noise_scale))

    def _noise_of(self, number: int, parameter: Tensor, step: int) -> Tensor:
        """Noise of the parameter's shape, float32; until it is called for the next one."""
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        noise = self._buffer[: parameter.numel()].view(rows, -1)
        if self._noise == "ones":
            noise.fill_(1.0)
        else:
            assert self._key is not None
            ops.normal_(noise, self._key.tensor(), table=MAX_TABLES + number, first_row=0, step=step)
        return noise.view(parameter.shape)

    def update(self, step: int) -> None:
        """Update the parameters with the gradients of `step`, at the learning rate of `step`."""
        if self._optimizer is None:
            return
        if self._learning_rate is not None:
            rate = self._learning_rate(step)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
        self._optimizer.step()

    def check_finite(self) -> None:
        """Raise NonFiniteError if a parameter is not finite."""
        for name, parameter in self._parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"dense parameter {name!r} holds values that are not finite: the run diverged, "
                    "lower the learning rate"
                )

    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimizer state, for a private checkpoint: references, not copies."""
        optimizer = {} if self._optimizer is None else self._optimizer.state_dict()
        return {"model": self._model.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, copied.

        Raises:
            FormatError: the state belongs to another model or optimizer.
        """
        try:
            self._model.load_state_dict(state["model"])
            if self._optimizer is not None:
                # Without the copy, torch would keep the tensors of `state` and change them in later steps.
                self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        except (RuntimeError, ValueError, KeyError) as error:
            raise FormatError(f"the checkpoint's dense layers belong to another model: {error}") from error


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
