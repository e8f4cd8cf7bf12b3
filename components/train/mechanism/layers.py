"""The trained layers of a model: how each finds the norms of per-example gradients, and why others are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism.norm_rules import NormRule, rule_of


class TrainedLayer(NamedTuple):
    """A layer with parameters to train.

    Attributes:
        module: the layer.
        names: of the parameters that it trains, from the layer on: `weight`, or `out_proj.weight` where the layer uses
            a part's parameter without calling the part.
        rule: how norms are found; None: by the slow path (`per_example`).
    """

    module: nn.Module
    names: tuple[str, ...]
    rule: NormRule | None

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name."""
        return self.module.get_parameter(name)


Layers = Mapping[str, TrainedLayer]
"""Layers with parameters to train, by the module's name."""

# What these share between examples has no per-example gradient to clip.
_COUPLING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# These hold parameters for the module around them, and are never called.
_LISTS = (nn.ParameterList, nn.ParameterDict)
# These use the parameters of their parts without calling them.
_WHOLE = (nn.MultiheadAttention,)


def trained_layers(model: nn.Module, *, without: Collection[nn.Module] = ()) -> Layers:
    """Every layer with parameters to train, by the module's name.

    A layer has a rule for its type, or takes the slow path; so do layers that share a parameter. Parameters frozen by
    `requires_grad=False` are constants, neither clipped nor given noise.

    Args:
        model: whose layers.
        without: layers that are trained in another way: tables.

    Raises:
        InputError: a layer that couples examples, a parameter that is computed from others (`weight_norm`), or one that
            is not float32; the message names it and a replacement.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        _refuse_coupling(_described(name, module), module)
    names: dict[str, list[str]] = {}
    owners: dict[nn.Parameter, set[str]] = {}
    for name, module in modules.items():
        if module in without:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                layer = _caller(name, modules)
                path = f"{name}.{key}".lstrip(".")
                _refuse_parameter(path, parameter, module)
                own = names.setdefault(layer, [])
                if parameter not in owners:
                    own.append(path.removeprefix(f"{layer}." if layer else ""))
                owners.setdefault(parameter, set()).add(layer)
    shared = {layer for of_parameter in owners.values() if len(of_parameter) > 1 for layer in of_parameter}
    return {layer: _trained(layer, modules[layer], tuple(own), slow=layer in shared) for layer, own in names.items()}


def slow_paths(layers: Layers) -> tuple[str, ...]:
    """Names of the parameters whose per-example gradients are formed."""
    slow = {name: layer for name, layer in layers.items() if layer.rule is None}
    return tuple(parameter_name(name, key) for name, layer in slow.items() for key in layer.names)


def parameter_name(layer: str, name: str) -> str:
    """The name of a layer's parameter in the model."""
    return f"{layer}.{name}" if layer else name


def _trained(name: str, module: nn.Module, names: tuple[str, ...], *, slow: bool) -> TrainedLayer:
    what = _described(name, module)
    rule = None if slow else rule_of(module)
    if rule is not None:
        strange = [key for key in names if key not in rule.parameters]
        if strange:
            raise InputError(
                f"parameter {strange[0]!r} of {what} is not one of {', '.join(rule.parameters)}, for which norms are "
                f"known: {_REPARAMETRISED}; a parameter that was added to a layer belongs into a module of its own"
            )
        return TrainedLayer(module, names, rule)
    if isinstance(module, _LISTS):
        raise InputError(f"{what} is no model: wrap it in a module that uses it in its forward")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise InputError(
            f"{what} changes forward, and its whole table would take the slow path: hold an nn.{_base(module)} in a "
            "module of your own, and change what it gives"
        )
    if isinstance(module, nn.RNNBase):
        _refuse_recurrent(what, module)
    return TrainedLayer(module, names, None)


_REPARAMETRISED = (
    "reparametrised layers (weight_norm, spectral_norm, pruning) cannot be trained privately; remove the "
    "reparametrisation (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove), or "
    "freeze the parameter by requires_grad_(False)"
)


def _refuse_coupling(what: str, module: nn.Module) -> None:
    if isinstance(module, _COUPLING) and not _is_per_example(module):
        raise InputError(
            f"{what} computes statistics over the batch, which couples examples: lazydp.api.fix(model) puts a layer in "
            "its place that normalises each example by itself (GroupNorm; use LayerNorm where you write the model)"
        )


def _refuse_parameter(path: str, parameter: nn.Parameter, owner: nn.Module) -> None:
    made = vars(owner).get(path.rpartition(".")[2].rpartition("_")[0])  # weight_g and weight_v make `weight`
    if isinstance(made, Tensor) or isinstance(owner, ParametrizationList):
        raise InputError(f"parameter {path!r} makes another tensor before its layer is called: {_REPARAMETRISED}")
    if isinstance(parameter, UninitializedParameter):
        raise InputError(f"parameter {path!r} has no shape yet: run one batch through the model first")
    if parameter.dtype != torch.float32:
        raise InputError(
            f"parameter {path!r} is {parameter.dtype}: norms and noise are made for float32; call model.float() first"
        )


def _refuse_recurrent(what: str, module: nn.RNNBase) -> None:
    if not module.batch_first:
        raise InputError(f"{what} takes its examples in the second dimension: build it with batch_first=True")
    if module.dropout and module.num_layers > 1:
        raise InputError(
            f"{what} drops between its layers, which no second run repeats: build {module.num_layers} layers of one "
            "each with nn.Dropout between them"
        )


def _described(name: str, module: nn.Module) -> str:
    return f"layer {name or '(the model itself)'!r} ({type(module).__name__})"


def _base(module: nn.Module) -> str:
    return "EmbeddingBag" if isinstance(module, nn.EmbeddingBag) else "Embedding"


def _caller(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of the module whose forward uses the parameters of the module called `name`."""
    for outer in _outwards(name):
        if isinstance(modules[outer], _WHOLE):
            return outer
    return next((outer for outer in _outwards(name) if not isinstance(modules[outer], _LISTS)), "")


def _outwards(name: str) -> Iterator[str]:
    """The name, and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _is_per_example(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats
