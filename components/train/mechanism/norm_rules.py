"""Rules: how each kind of layer gives the norms of per-example gradients, and the sum of the clipped ones.

A rule works on what one layer saw in one forward and backward pass: its input a and the gradient e of its output. No
per-example gradient is formed. The method is that of Goodfellow 2015 (arXiv 1510.01799) and of "ghost clipping" (Li et
al. 2021, arXiv 2110.05679, who introduced the Gram form for sequences), without their second backward pass.

A layer of your own takes part once `register_rule(MyLayer, MyRule())` says how its norms are found. What holds for
every layer: its input and output are batch-first, and it treats examples independently of each other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lazydp.components.shared.errors import InputError

_CHUNK_BYTES = 1 << 24


_FLOAT32_EPSILON = torch.finfo(torch.float32).eps


class NormRule(ABC):
    """How one kind of layer turns captured pairs into norms and clipped sums.

    The arguments of both methods: `layer`; `names` of its own parameters that are trained ("weight", "bias");
    `inputs` and `grads`, the layer's input and output gradient, [B, P, ...] where P counts the positions of an
    example that the layer saw (1, or the candidates, or several calls). Where users are clipped, `sq_norms` is
    called with a user's examples as the positions of one example: its norms have to be those of sums over positions.

    Attributes:
        parameters: names of the layer's own parameters that the rule gives norms for. A layer with another trained
            parameter is refused.
    """

    parameters: ClassVar[tuple[str, ...]]

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

    parameters = ("weight", "bias")

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

    parameters = ("weight", "bias")

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


def register_rule(layer_type: type[nn.Module], rule: NormRule) -> None:
    """Let layers of exactly `layer_type` (not its subclasses: they may compute something else) be trained privately.

    Raises:
        InputError: the rule does not state the names of the parameters that it gives norms for.
    """
    if not getattr(rule, "parameters", ()):
        raise InputError(
            f"{type(rule).__name__} does not state its `parameters`: name those of {layer_type.__name__} that it gives "
            'norms for, such as parameters = ("weight", "bias")'
        )
    _rules[layer_type] = rule


def rule_of(layer: nn.Module) -> NormRule | None:
    """The rule for layers of exactly this type; None where there is none."""
    return _rules.get(type(layer))


def supported_layers() -> tuple[str, ...]:
    """Names of the layer types that have a rule."""
    return tuple(sorted(layer_type.__name__ for layer_type in _rules))
