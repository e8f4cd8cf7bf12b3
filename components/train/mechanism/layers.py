"""The trained layers of a model, and why others are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism.norm_rules import rule_of, supported_layers

Layers = Mapping[str, tuple[nn.Module, tuple[str, ...]]]
"""Layers with parameters to train: the module and the names of those parameters, by the module's name."""


# What these share between examples has no per-example gradient to clip.
_COUPLING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def trained_layers(model: nn.Module, *, without: Collection[nn.Module] = ()) -> Layers:
    """Every layer with parameters to train: its module and the names of those parameters, by the module's name.

    Parameters frozen by `requires_grad=False` are constants, neither clipped nor given noise.

    Args:
        model: whose layers.
        without: layers that are trained in another way: tables.

    Raises:
        InputError: a layer without a rule, a parameter that its rule does not name, a layer that couples examples, or a
            parameter shared by two layers.
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
        if not names or module in without:
            continue
        rule = rule_of(module)
        if rule is None:
            raise InputError(
                f"{what} has parameters {list(names)} and no rule for per-example norms: supported are "
                f"{', '.join(supported_layers())}; register_rule adds a layer of your own"
            )
        strange = [key for key in names if key not in rule.parameters]
        if strange:
            raise InputError(
                f"parameter {strange[0]!r} of {what} is not one of {', '.join(rule.parameters)}, for which norms are "
                "known: reparametrised layers (weight_norm, spectral_norm, pruning) and parameters added to a layer "
                "cannot be trained privately; remove the reparametrisation, or freeze the parameter by "
                "requires_grad_(False)"
            )
        for key in names:
            owner = owners.setdefault(id(getattr(module, key)), f"{name}.{key}")
            if owner != f"{name}.{key}":
                raise InputError(f"{what} shares {key!r} with {owner}: a parameter must belong to one layer")
        found[name] = (module, names)
    return found


def _is_per_example(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats
