"""Gradient norms of privacy units and clipped sums from one backward pass; no per-example gradient is ever formed.

While a `Capture` is open, parameters are constants to autograd, so the backward pass forms no weight gradients; hooks
keep, for each call of each layer, what went in (a) and the gradient of what came out (e). A layer's rule turns the
pair into the squared norm of each unit's gradient (an example's, or that of a user's examples together: `units`) and,
once the clipping coefficients are known, into the sum of scaled gradients by one product. The method is that of
Goodfellow 2015 (arXiv 1510.01799) and of "ghost clipping" (Li et al. 2021, arXiv 2110.05679, who introduced the Gram
form for sequences), without their second backward pass.

A layer of your own takes part once `register_rule(MyLayer, MyRule())` says how its norms are found. What holds for
every layer: its input and output are batch-first, and it treats examples independently of each other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lazydp.components.shared.errors import InputError
from lazydp.components.train.device.placement import CPU, moved, refuse_rounded_products
from lazydp.components.train.mechanism.units import Units

Layers = Mapping[str, tuple[nn.Module, tuple[str, ...]]]
"""Layers with parameters to train: the module and the names of those parameters, by the module's name."""

_CHUNK_BYTES = 1 << 24
_FLOAT32_EPSILON = torch.finfo(torch.float32).eps


class NormRule(ABC):
    """How one kind of layer turns captured pairs into norms and clipped sums.

    The arguments of both methods: `layer`; `names` of its own parameters that are trained ("weight", "bias");
    `inputs` and `grads`, the layer's input and output gradient, [B, P, ...] where P counts the positions of an
    example that the layer saw (1, or the candidates, or several calls). Where users are clipped, `sq_norms` is
    called with a user's examples as the positions of one example: its norms have to be those of sums over positions.
    """

    @abstractmethod
    def sq_norms(self, layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> Tensor:
        """Squared norm of each example's gradient over the parameters `names`, [B]; never an underestimate."""

    @abstractmethod
    def add_weighted(
        self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Mapping[str, Tensor]
    ) -> None:
        """Add sum_i scale[i] g_i to the tensors of `into`, one for each trained parameter."""


class LinearRule(NormRule):
    """`nn.Linear`: the gradient of an example is the sum over positions of outer products e a'.

    One position: ||g||^2 = ||a||^2 ||e||^2. Several: sum_pq (a_p . a_q)(e_p . e_q) by Gram matrices, or the gradient
    itself, formed in small chunks of examples, where that is cheaper.
    """

    def sq_norms(self, layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> Tensor:
        total = grads.new_zeros(grads.shape[0])
        if "weight" in names:
            total += _linear_weight_sq_norms(inputs, grads)
        if "bias" in names:
            total += _sq_norms_of_sums(grads)
        return total

    def add_weighted(
        self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Mapping[str, Tensor]
    ) -> None:
        # A scale per position; positions then are rows like any other.
        scale = scale.repeat_interleave(grads.shape[1]) if grads.shape[1] > 1 else scale
        inputs, grads = inputs.flatten(0, 1), grads.flatten(0, 1)
        if "bias" in into:
            into["bias"].addmv_(grads.t(), scale)
        if "weight" in into:
            if inputs.shape[1] < grads.shape[1]:
                inputs = inputs * scale.unsqueeze(1)
            else:
                grads = grads * scale.unsqueeze(1)
            into["weight"].addmm_(grads.t(), inputs)


def _linear_weight_sq_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    positions, num_in, num_out = inputs.shape[1], inputs.shape[2], grads.shape[2]
    if positions == 1:
        # The product first: either factor's square may overflow where the product's does not.
        return (_norms(inputs.squeeze(1)) * _norms(grads.squeeze(1))).square_()
    if positions * (num_in + num_out) <= num_in * num_out:
        return _gram_sq_norms(inputs, grads)
    return _direct_sq_norms(inputs, grads)


def _rounding(terms: int) -> float:
    """What rounding may add to a float32 sum of so many terms, relative to the sum of their absolute values.

    Positions may cancel (softmax gradients of like candidates do), and the rounding error of the cancelled terms can
    then exceed the true norm. It is added, so that no norm falls short and clipping keeps its promise. The bound is
    the probabilistic one of Higham and Mary 2019 (SIAM J. Sci. Comput. 41), with a factor to spare.
    """
    return 4 * _FLOAT32_EPSILON * math.sqrt(terms)


def _gram_sq_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    per_example = 2 * 4 * inputs.shape[1] ** 2
    return _in_chunks(_gram_of_chunk, inputs, grads, bytes_each=per_example)


def _gram_of_chunk(inputs: Tensor, grads: Tensor) -> Tensor:
    of_inputs = torch.bmm(inputs, inputs.transpose(1, 2))
    of_grads = torch.bmm(grads, grads.transpose(1, 2))
    slack = _rounding(inputs.shape[2] + grads.shape[2]) * _traces(of_inputs) * _traces(of_grads)
    return of_inputs.mul_(of_grads).sum(dim=(1, 2)).clamp_(min=0.0) + slack


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(dim=1)


def _direct_sq_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    per_example = 4 * inputs.shape[2] * grads.shape[2]
    return _in_chunks(_direct_of_chunk, inputs, grads, bytes_each=per_example)


def _direct_of_chunk(inputs: Tensor, grads: Tensor) -> Tensor:
    norms = _norms(torch.bmm(grads.transpose(1, 2), inputs).flatten(1))
    # The absolute values of all products add up to the matrix |e|' |a|, of norm at most ||e|| ||a||.
    slack = _rounding(inputs.shape[1]) * _norms(inputs.flatten(1)) * _norms(grads.flatten(1))
    return (norms + slack).square_()


def _sq_norms_of_sums(terms: Tensor) -> Tensor:
    """Squared norms [B] of sums over positions: terms [B, P, ...]."""
    positions = terms.shape[1]
    if positions == 1:
        return _norms(terms.flatten(1)).square_()
    # The absolute values of P terms add up to at most sqrt(P) times the root of the sum of their squares.
    slack = _rounding(positions) * math.sqrt(positions) * _norms(terms.flatten(1))
    return (_norms(terms.sum(dim=1).flatten(1)) + slack).square_()


def _in_chunks(
    sq_norms: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, grads: Tensor, *, bytes_each: int
) -> Tensor:
    """`sq_norms` of so few examples at a time that what it forms stays in the cache."""
    chunk = max(1, _CHUNK_BYTES // bytes_each)
    if inputs.shape[0] <= chunk:
        return sq_norms(inputs, grads)
    parts = zip(torch.split(inputs, chunk), torch.split(grads, chunk), strict=True)
    return torch.cat([sq_norms(some_inputs, some_grads) for some_inputs, some_grads in parts])


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


class LayerNormRule(NormRule):
    """`nn.LayerNorm`: its parameters are as small as its output, so their per-example gradients are formed."""

    def sq_norms(self, layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> Tensor:
        total = grads.new_zeros(grads.shape[0])
        for terms in self._terms(layer, names, inputs, grads).values():
            total += _sq_norms_of_sums(terms)
        return total

    def add_weighted(
        self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Mapping[str, Tensor]
    ) -> None:
        for name, terms in self._terms(layer, tuple(into), inputs, grads).items():
            into[name].view(-1).addmv_(terms.sum(dim=1).flatten(1).t(), scale)

    @staticmethod
    def _terms(layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> dict[str, Tensor]:
        """What each position adds to the gradient of each parameter, [B, P, ...]."""
        assert isinstance(layer, nn.LayerNorm)
        terms = {}
        if "weight" in names:
            terms["weight"] = grads * functional.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
        if "bias" in names:
            terms["bias"] = grads
        return terms


_rules: dict[type[nn.Module], NormRule] = {nn.Linear: LinearRule(), nn.LayerNorm: LayerNormRule()}
# What these share between examples has no per-example gradient to clip.
_COUPLING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def register_rule(layer_type: type[nn.Module], rule: NormRule) -> None:
    """Let layers of exactly `layer_type` (not its subclasses: they may compute something else) be trained privately."""
    _rules[layer_type] = rule


def supported_layers() -> tuple[str, ...]:
    """Names of the layer types that have a rule."""
    return tuple(sorted(layer_type.__name__ for layer_type in _rules))


def trained_layers(model: nn.Module) -> Layers:
    """Every layer with parameters to train: its module and the names of those parameters, by the module's name.

    Parameters frozen by `requires_grad=False` are constants, neither clipped nor given noise.

    Raises:
        InputError: a layer without a rule, a layer that couples examples, or a parameter shared by two layers.
    """
    found: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        what = f"layer {name or '(the model itself)'!r} ({type(module).__name__})"
        if isinstance(module, _COUPLING) and not _is_per_example(module):
            raise InputError(
                f"{what} computes statistics over the batch, which couples examples: use LayerNorm instead"
            )
        names = tuple(key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad)
        if not names:
            continue
        if type(module) not in _rules:
            raise InputError(
                f"{what} has parameters {list(names)} and no rule for per-example norms: supported are "
                f"{', '.join(supported_layers())}; register_rule adds a layer of your own"
            )
        for key in names:
            owner = owners.setdefault(id(getattr(module, key)), f"{name}.{key}")
            if owner != f"{name}.{key}":
                raise InputError(f"{what} shares {key!r} with {owner}: a parameter must belong to one layer")
        found[name] = (module, names)
    return found


def _is_per_example(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats


class _Tap(torch.autograd.Function):
    """Passes a layer's output on as it is, and keeps its gradient on the way back.

    A tensor hook would be lost where the output is a view that is then modified in place (a linear layer over
    positions, then an in-place activation). The anchor makes the output of a layer that nothing trainable feeds part of
    the graph, so that its gradient is computed at all.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        ctx.keep = keep
        # The same memory, and to autograd no view of anything: in-place activations may follow.
        storage = output.untyped_storage()
        return output.new_empty(0).set_(storage, output.storage_offset(), output.shape, output.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.keep(grad)
        return grad if ctx.needs_input_grad[0] else None, None, None


class _Calls:
    """What one layer saw in one forward and backward pass."""

    def __init__(self, name: str, layer: nn.Module, names: tuple[str, ...]) -> None:
        self.name = name
        self.layer = layer
        self.names = names
        self._inputs: list[tuple[Tensor, int]] = []
        self._grads: list[Tensor | None] = []

    def keep(self, inputs: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """Keep one call; its output, to be passed on."""
        call = len(self._inputs)
        self._inputs.append((inputs.detach(), inputs._version))
        self._grads.append(None)

        def keep_grad(grad: Tensor) -> None:
            self._grads[call] = grad

        tapped: Tensor = _Tap.apply(output, anchor, keep_grad)  # type: ignore[no-untyped-call]
        return tapped

    def pair(self, size: int) -> tuple[Tensor, Tensor] | None:
        """Inputs and output gradients of all calls, [B, P, ...]; None where no gradient came back."""
        dims = self._feature_dims()
        inputs, grads = [], []
        for (some_inputs, version), grad in zip(self._inputs, self._grads, strict=True):
            if grad is None:
                continue
            if some_inputs._version != version:
                raise InputError(
                    f"the input of layer {self.name!r} ({type(self.layer).__name__}) was modified in place after the "
                    "layer had read it: per-example norms need it as it was"
                )
            self._refuse_other_size(some_inputs.shape[0], size)
            inputs.append(_positions(some_inputs, dims))
            grads.append(_positions(grad, dims))
        if not inputs:
            return None
        if len(inputs) == 1:
            return inputs[0], grads[0]
        return torch.cat(inputs, dim=1), torch.cat(grads, dim=1)

    def forget_gradients(self) -> None:
        """Before another backward pass over the same calls."""
        self._grads = [None] * len(self._grads)

    def gradients(self, size: int) -> Iterator[Tensor]:
        """The gradients that came back, [B, ...]."""
        for grad in self._grads:
            if grad is not None:
                self._refuse_other_size(grad.shape[0], size)
                yield grad

    def _refuse_other_size(self, found: int, size: int) -> None:
        if found != size:
            raise InputError(
                f"layer {self.name!r} ({type(self.layer).__name__}) saw a first dimension of {found} in a batch of "
                f"{size} examples: layers must be batch-first"
            )

    def _feature_dims(self) -> int:
        """Trailing dimensions that belong to one position."""
        return len(self.layer.normalized_shape) if isinstance(self.layer, nn.LayerNorm) else 1


def _positions(tensor: Tensor, feature_dims: int) -> Tensor:
    """[B, P, features...] of a tensor with any number of position dimensions."""
    position_dims = tensor.dim() - 1 - feature_dims
    if position_dims == 0:
        return tensor.unsqueeze(1)
    return tensor if position_dims == 1 else tensor.flatten(1, position_dims)


def _not_zero(grad: Tensor) -> Tensor:
    """Examples that a gradient [B, ...] is not zero for. NaN says nothing: zero times an infinite slope is NaN too."""
    return (grad.flatten(1).abs() > 0).any(dim=1).cpu()


class Capture:
    """Keeps what norms and clipped sums need, while the forward and backward pass of one micro-batch run inside it.

    Used once:

        with Capture(layers) as capture:
            losses = ...
            losses.sum().backward()
        sq_norms = capture.sq_norms(units)
        capture.add_weighted(scale)          # into the parameters' .grad

    Args:
        layers: what `trained_layers` found.
        device: where they compute. What is given as [B] may live elsewhere.

    Raises:
        InputError: on entering, where matrix products are rounded to less than float32.
    """

    def __init__(self, layers: Layers, device: torch.device = CPU) -> None:
        self._device = device
        self._calls = [_Calls(name, layer, names) for name, (layer, names) in layers.items()]
        self._handles: list[RemovableHandle] = []
        self._pairs: list[tuple[_Calls, Tensor, Tensor]] = []

    def __enter__(self) -> Self:
        refuse_rounded_products(self._device)
        self._anchor = torch.zeros((), requires_grad=True)
        for calls in self._calls:
            for name in calls.names:
                getattr(calls.layer, name).requires_grad_(False)
            self._handles.append(calls.layer.register_forward_hook(self._hook(calls)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for calls in self._calls:
            for name in calls.names:
                getattr(calls.layer, name).requires_grad_(True)

    def _hook(self, calls: _Calls) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return calls.keep(inputs[0], output, self._anchor)

        return keep

    def sq_norms(self, units: Units) -> Tensor:
        """Squared norm of each unit's gradient (the sum of its examples') over all layers, float32 [U]."""
        total = torch.zeros(units.count, device=self._device)
        for calls in self._calls:
            pair = calls.pair(units.num_examples)
            if pair is not None:
                self._pairs.append((calls, *pair))
                total += _sq_norms_of_units(calls, *pair, units)
        return total

    def reached(self, total: Tensor, pooled: Sequence[tuple[str, Tensor]], size: int) -> Iterator[tuple[str, Tensor]]:
        """Which examples the gradient of `total` comes back to, bool [B] on the host, layer by layer.

        Called before the backward pass, which finds everything as it was.

        Args:
            total: what is differentiated.
            pooled: name and pooled rows [F * B, D] of each read of an embedding layer, feature by feature.
            size: B.

        Yields:
            Name of a layer, and the examples.
        """
        for calls in self._calls:
            calls.forget_gradients()
        wanted = [self._anchor, *(rows for _, rows in pooled)]
        _, *of_rows = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
        for (name, rows), grad in zip(pooled, of_rows, strict=True):
            if grad is not None:
                yield name, _not_zero(grad.view(-1, size, rows.shape[1]).transpose(0, 1))
        for calls in self._calls:
            for grad in calls.gradients(size):
                yield calls.name, _not_zero(grad)

    def drop(self, examples: Tensor) -> None:
        """Make the gradients of `examples` (mask [B]) zero: scaling by zero would keep what is not finite."""
        (examples,) = moved([examples], self._device)
        self._pairs = [
            (calls, without(inputs, examples), without(grads, examples)) for calls, inputs, grads in self._pairs
        ]

    def add_weighted(self, scale: Tensor) -> None:
        """Add sum_i scale[i] g_i to the `.grad` of every parameter (which must exist)."""
        (scale,) = moved([scale], self._device)
        for calls, inputs, grads in self._pairs:
            into = {name: getattr(calls.layer, name).grad for name in calls.names}
            _rules[type(calls.layer)].add_weighted(calls.layer, inputs, grads, scale, into)
        # What a step keeps beyond its end costs the next one fresh pages.
        self._pairs.clear()


def _sq_norms_of_units(calls: _Calls, inputs: Tensor, grads: Tensor, units: Units) -> Tensor:
    rule = _rules[type(calls.layer)]
    if units.single:
        return rule.sq_norms(calls.layer, calls.names, inputs, grads)
    # n examples of a user, of P positions each, are n P positions: the gradient is the sum over all of them.
    parts = [rule.sq_norms(calls.layer, calls.names, run.joined(inputs), run.joined(grads)) for run in units.runs()]
    return torch.cat(parts)


def without(tensor: Tensor, examples: Tensor) -> Tensor:
    """A copy of [B, ...] with zeros for `examples` (mask [B])."""
    return tensor.masked_fill(examples.view(-1, *[1] * (tensor.dim() - 1)), 0.0)


_SAFETY = 1.0 + 1e-5


def clip_coefficients(sq_norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """min(1, C / ||g_i||) for each unit, float32 [U]; zero where the norm is not finite.

    Norms are rounded; the coefficient is taken smaller by 1e-5, relative, so that no contribution passes C by rounding.
    """
    norms = sq_norms.sqrt()
    coefficients = (max_grad_norm / (norms * _SAFETY)).clamp(max=1.0)
    return coefficients.masked_fill(~torch.isfinite(norms), 0.0)
