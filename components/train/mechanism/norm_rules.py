"""Rules: how each kind of layer gives the norms of per-example gradients, and the sum of the clipped ones.

A rule works on what one layer saw in one forward and backward pass: its input a and the gradient e of its output. No
per-example gradient is formed. The method is that of Goodfellow 2015 (arXiv 1510.01799) and of "ghost clipping" (Li et
al. 2021, arXiv 2110.05679, who introduced the Gram form for sequences), without their second backward pass.

A layer of your own takes part once `register_rule(MyLayer, MyRule())` says how its norms are found. What holds for
every layer: its input and output are batch-first, and it treats examples independently of each other.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism.double_sums import LayerSums
from lazydp.kernels import products

_CHUNK_BYTES = 1 << 24

_UNIT = 2.0**-24  # what a float32 operation rounds, relative
_LEAST = torch.finfo(torch.float32).tiny
_SAFE_NORMS = (1e-12, 1e18)  # squares of elements that matter are normal float32
_LONG_ROW = 4096
_LOOSE = 0.02  # of a squared norm: 1 % of the norm
_AT_ONCE = 4096  # terms in one product of BLAS, which adds them in an order of its own (docs/floating-point.md)
_LEAST_NORM = 2.0**-14  # of the sum of a unit's absolute terms (docs/floating-point.md)


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

    double_sums = False
    """Whether `add_weighted` computes in float64 whatever it is given; a rule that does not is given float64."""

    @abstractmethod
    def sq_norms(self, layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> Tensor:
        """Squared norm of each example's gradient over the parameters `names`, float64 [B]; never an underestimate."""

    @abstractmethod
    def add_weighted(
        self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Mapping[str, Tensor]
    ) -> None:
        """Add sum_i scale[i] g_i to the tensors of `into`, float64 and contiguous, one for each trained parameter.

        All terms have to be formed and added in float64: in float32 one unit would move how the others are rounded.
        """

    def add_exact(
        self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Mapping[str, Tensor]
    ) -> None:
        """`add_weighted`, of float64 copies where the rule needs them."""
        if not self.double_sums:
            inputs, grads, scale = inputs.double(), grads.double(), scale.double()
        self.add_weighted(layer, inputs, grads, scale, into)

    def add_single(
        self,
        layer: nn.Module,
        inputs: Tensor,
        grads: Tensor,
        scale: Tensor,
        into: Mapping[str, Tensor],
        *,
        order: Tensor | None,
        block: int,
    ) -> None:
        """`add_exact` where each unit is one example of one position; a rule may add in blocks of units.

        Args:
            layer: and the others, see `add_weighted`.
            inputs: [B, 1, ...].
            grads: [B, 1, ...].
            scale: float32 [B].
            into: as for `add_weighted`.
            order: a random permutation of the units, int64 [B]; None: as they lie.
            block: how many units, in that order, may be added in float32, each element term after term
                (`kernels.products.weighted_product_`); blocks are added in float64.
        """
        del order, block  # float64 needs neither
        self.add_exact(layer, inputs, grads, scale, into)


class LinearRule(NormRule):
    """`nn.Linear`: the gradient of an example is the sum over positions of outer products e a'.

    One position: ||g||^2 = ||a||^2 ||e||^2. Several: sum_pq (a_p . a_q)(e_p . e_q) by Gram matrices, or the gradient
    itself, formed in small chunks of examples, where that is cheaper, or where positions cancel so far that the bound
    on the rounding of Gram matrices would be more than 1 % of the norm.
    """

    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    double_sums = True

    def sq_norms(self, layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> Tensor:
        total = grads.new_zeros(grads.shape[0], dtype=torch.float64)
        if "weight" in names:
            total += _linear_weight_sq_norms(inputs, grads)
        if "bias" in names:
            total += _sq_norms_of_sums(grads)
        return total

    def add_weighted(
        self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Mapping[str, Tensor]
    ) -> None:
        into = self._named(into)
        # A scale per position; positions then are rows like any other.
        scale = scale.repeat_interleave(grads.shape[1]) if grads.shape[1] > 1 else scale
        inputs, grads = inputs.flatten(0, 1), grads.flatten(0, 1)
        if "bias" in into:
            _add_scaled(grads, scale, into["bias"])
        if "weight" in into:
            _add_products(grads, inputs, scale, into["weight"])

    def add_single(
        self,
        layer: nn.Module,
        inputs: Tensor,
        grads: Tensor,
        scale: Tensor,
        into: Mapping[str, Tensor],
        *,
        order: Tensor | None,
        block: int,
    ) -> None:
        num_in, num_out = inputs.shape[2], grads.shape[2]
        in_blocks = inputs.is_cpu and inputs.dtype == grads.dtype == torch.float32 and min(num_in, num_out) > 1
        if not in_blocks:
            self.add_exact(layer, inputs, grads, scale, into)
            return
        into = self._named(into)
        inputs, grads = inputs.squeeze(1).contiguous(), grads.squeeze(1).contiguous()
        if "bias" in into:
            _add_scaled(grads, scale, into["bias"])
        if "weight" in into:
            total, empty = into.begun("weight") if isinstance(into, LayerSums) else (into["weight"], False)
            products.weighted_product_(total, grads, inputs, scale, order=order, block=block, overwrite=empty)

    def _named(self, into: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of `into` by the names `weight` and `bias`, `weight` as a matrix."""
        return into


def single_products(rule: NormRule, names: Sequence[str], inputs: Tensor, grads: Tensor) -> tuple[bool, bool] | None:
    """Whether a unit adds one outer product of grads and inputs, and whether it adds grads; None: it does otherwise.

    `kernels.products.foreach_product_sq_norms` gives the norms of many such layers at once.
    """
    if type(rule) not in (LinearRule, MatrixRule) or inputs.shape[1] != 1:
        return None
    if not inputs.is_cpu or inputs.dtype != torch.float32 or grads.dtype != torch.float32:
        return None
    return (True, False) if isinstance(rule, MatrixRule) else ("weight" in names, "bias" in names)


def _add_scaled(terms: Tensor, scale: Tensor, into: Tensor) -> None:
    """Add sum_i scale[i] terms[i] to `into`, in float64."""
    if terms.is_cpu and terms.dtype == torch.float32:
        products.weighted_sum_(into, terms.contiguous(), scale.double())
        return
    rows = min(_AT_ONCE, max(1, _CHUNK_BYTES // (8 * terms.shape[1])))
    for first in range(0, terms.shape[0], rows):
        some = slice(first, first + rows)
        into.addmv_(terms[some].double().t(), scale[some].double())


def _add_products(grads: Tensor, inputs: Tensor, scale: Tensor, into: Tensor) -> None:
    """Add grads' diag(scale) inputs to `into`, in float64."""
    if grads.shape[1] == 1:
        _add_scaled(inputs, scale.double() * grads.squeeze(1).double(), into.view(-1))
        return
    if inputs.shape[1] == 1:
        _add_scaled(grads, scale.double() * inputs.squeeze(1).double(), into.view(-1))
        return
    rows = min(_AT_ONCE, max(1, _CHUNK_BYTES // (8 * (grads.shape[1] + inputs.shape[1]))))
    for first in range(0, grads.shape[0], rows):
        some = slice(first, first + rows)
        into.addmm_((grads[some].double() * scale[some].double().unsqueeze(1)).t(), inputs[some].double())


def _linear_weight_sq_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    if inputs.shape[1] == 1:
        return (_norms(inputs.squeeze(1)) * _norms(grads.squeeze(1))).square_()
    return _direct_sq_norms(inputs, grads) if direct_is_cheaper(inputs, grads) else _gram_sq_norms(inputs, grads)


def direct_is_cheaper(inputs: Tensor, grads: Tensor) -> bool:
    """Whether the norms of products of inputs and grads, [B, P, n] and [B, P, m], take less work if they are formed."""
    positions, num_in, num_out = inputs.shape[1], inputs.shape[2], grads.shape[2]
    return positions > 1 and positions * (num_in + num_out) > num_in * num_out


# Positions may cancel (softmax gradients of like candidates do), and what rounding does to the cancelled terms can then
# exceed the true norm. So a bound on it is added (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1:
# n terms are added with an error of at most n 2^-24 times the sum of their absolute values, in any order), and one on
# what falls below the least float32. Terms that cancel further than to `_LEAST_NORM` of themselves would also be huge
# beside what other units add, and round it away, in float64 too.


def _gram_sq_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    per_example = 2 * 8 * inputs.shape[1] ** 2
    return _in_chunks(_gram_of_chunk, inputs, grads, bytes_each=per_example)


def _gram_of_chunk(inputs: Tensor, grads: Tensor) -> Tensor:
    # A GPU multiplies in float64, where the bound is small: to look at it there the host would have to wait.
    exact = not inputs.is_cpu
    first, second = (inputs.double(), grads.double()) if exact else (inputs, grads)
    of_inputs = torch.bmm(first, first.transpose(1, 2)).double()
    of_grads = torch.bmm(second, second.transpose(1, 2)).double()
    input_norms, grad_norms = _norms_of_positions(inputs), _norms_of_positions(grads)
    unit = 2.0**-53 if exact else _UNIT
    rounding = unit * (inputs.shape[2] + grads.shape[2] + 4) * (input_norms * grad_norms).sum(dim=1).square()
    lost = inputs.shape[2] * grad_norms.sum(dim=1).square() + grads.shape[2] * input_norms.sum(dim=1).square()
    found = of_inputs.mul_(of_grads).sum(dim=(1, 2)).clamp_(min=0.0)
    slack = rounding + _LEAST * lost
    total = found + slack
    if exact:
        return torch.maximum(total, (_LEAST_NORM * (input_norms * grad_norms).sum(dim=1)).square())
    loose = slack > _LOOSE * found  # always, where terms cancel as far as `_LEAST_NORM`
    if bool(loose.any()):
        # Both bound the norm from above. The direct one rounds the gradient, not its square, hence is far closer here.
        total[loose] = torch.minimum(total[loose], _direct_sq_norms(inputs[loose], grads[loose]))
    return total


def _direct_sq_norms(inputs: Tensor, grads: Tensor) -> Tensor:
    per_example = 4 * inputs.shape[2] * grads.shape[2]
    return _in_chunks(_direct_of_chunk, inputs, grads, bytes_each=per_example)


def _direct_of_chunk(inputs: Tensor, grads: Tensor) -> Tensor:
    products = torch.bmm(grads.transpose(1, 2), inputs).flatten(1)
    positions = inputs.shape[1]
    absolute = (_norms_of_positions(inputs) * _norms_of_positions(grads)).sum(dim=1)
    rounding = _UNIT * (positions + 2) * absolute + _LEAST * positions * math.sqrt(products.shape[1])
    return torch.maximum(_norms(products) + rounding, _LEAST_NORM * absolute).square_()


def _sq_norms_of_sums(terms: Tensor) -> Tensor:
    """Squared norms [B] of sums over positions: terms [B, P, ...]."""
    positions = terms.shape[1]
    if positions == 1:
        return _norms(terms.flatten(1)).square_()
    sums = terms.sum(dim=1, dtype=torch.float64).flatten(1)
    absolute = _norms_of_positions(terms.flatten(2)).sum(dim=1)
    norms: Tensor = torch.linalg.vector_norm(sums, dim=1)
    return torch.maximum(norms + 2.0**-52 * positions * absolute, _LEAST_NORM * absolute).square_()


def _in_chunks(
    sq_norms: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, grads: Tensor, *, bytes_each: int
) -> Tensor:
    """`sq_norms` of so few examples at a time that what it forms stays in the cache."""
    chunk = max(1, _CHUNK_BYTES // bytes_each)
    if inputs.shape[0] <= chunk:
        return sq_norms(inputs, grads)
    parts = zip(torch.split(inputs, chunk), torch.split(grads, chunk), strict=True)
    return torch.cat([sq_norms(some_inputs, some_grads) for some_inputs, some_grads in parts])


def _norms_of_positions(tensor: Tensor) -> Tensor:
    """[B, P] of [B, P, n], as `_norms`."""
    return _norms(tensor.flatten(0, 1)).view(tensor.shape[:2])


def _norms(rows: Tensor) -> Tensor:
    """Norms of float32 rows [N, n]: float64 [N], never below the truth.

    In float32, where squares neither overflow nor vanish, with a bound on its rounding; else in float64.
    """
    exact = functools.partial(torch.linalg.vector_norm, dim=1, dtype=torch.float64)
    columns = rows.shape[1]
    if rows.dtype != torch.float32 or not rows.is_cpu:
        found: Tensor = exact(rows)
        return found * (1.0 + 2.0**-52 * (columns + 2))
    if columns > _LONG_ROW:
        # In pieces: a float64 copy of rows this long (formed gradients) would cost more than all else.
        pieces = torch.stack([_norms(piece) for piece in torch.split(rows, _LONG_ROW, dim=1)], dim=1)
        found = exact(pieces)
        return found * (1.0 + 2.0**-52 * (pieces.shape[1] + 2))
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1).double() * (1.0 + _UNIT * (columns / 2 + 2))
    outside = ~((norms > _SAFE_NORMS[0]) & (norms < _SAFE_NORMS[1]))
    if bool(outside.any()):
        norms[outside] = exact(rows[outside])
    return norms


class LayerNormRule(NormRule):
    """`nn.LayerNorm`: its parameters are as small as its output, so their per-example gradients are formed."""

    parameters = ("weight", "bias")
    double_sums = True

    def sq_norms(self, layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> Tensor:
        total = grads.new_zeros(grads.shape[0], dtype=torch.float64)
        for terms in self._terms(layer, names, inputs, grads).values():
            total += _sq_norms_of_sums(terms)
        return total

    def add_weighted(
        self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Mapping[str, Tensor]
    ) -> None:
        for name, terms in self._terms(layer, tuple(into), inputs, grads).items():
            _add_scaled(_sums_of_positions(terms), scale, into[name].view(-1))

    @staticmethod
    def _terms(layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> dict[str, Tensor]:
        """What each position adds to the gradient of each parameter, [B, P, ...]; several cancel as in float64."""
        assert isinstance(layer, nn.LayerNorm)
        terms = {}
        normalised = functional.layer_norm(inputs, layer.normalized_shape, eps=layer.eps) if "weight" in names else None
        grads = grads.double() if grads.shape[1] > 1 else grads
        if normalised is not None:
            terms["weight"] = grads * normalised
        if "bias" in names:
            terms["bias"] = grads
        return terms


def _sums_of_positions(terms: Tensor) -> Tensor:
    """[B, n] of terms [B, P, ...]; what one position adds is no sum, and keeps its type."""
    return (terms.squeeze(1) if terms.shape[1] == 1 else terms.sum(dim=1, dtype=torch.float64)).flatten(1)


class FormedRule(NormRule):
    """A parameter on the slow path, whatever its layer: `grads` are its per-example gradients, [B, P, n].

    They are what is added, so that their norm has no other rounding than its own.
    """

    parameters = ()
    double_sums = True

    def sq_norms(self, layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> Tensor:
        return _sq_norms_of_sums(grads)

    def add_weighted(
        self, layer: nn.Module, inputs: Tensor, grads: Tensor, scale: Tensor, into: Mapping[str, Tensor]
    ) -> None:
        (total,) = into.values()
        scale = scale.repeat_interleave(grads.shape[1]) if grads.shape[1] > 1 else scale
        _add_scaled(grads.flatten(0, 1), scale, total.view(-1))


class MatrixRule(LinearRule):
    """A matrix on the slow path, or some of its rows, that is multiplied by what belongs to the examples."""

    parameters = ()

    def sq_norms(self, layer: nn.Module, names: Sequence[str], inputs: Tensor, grads: Tensor) -> Tensor:
        return super().sq_norms(layer, ("weight",), inputs, grads)

    def _named(self, into: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        (total,) = into.values()
        return {"weight": total.flatten(1)}


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
