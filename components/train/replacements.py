"""Layers that cannot be trained privately, replaced by their nearest kin that can."""

from __future__ import annotations

import math
from collections.abc import Iterator

import click
import torch
from torch import nn

from lazydp.components.shared.errors import InputError

_BatchNorm, _InstanceNorm = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
_MOST_GROUPS = 32


def fix(model: nn.Module) -> nn.Module:
    """Replace what `make_private` refuses and what has a usual replacement; prints each change.

    - `BatchNorm1d` becomes `GroupNorm(1, C)`: over [B, C] it is `LayerNorm(C)`, and it takes [B, C, L], too.
    - `BatchNorm2d`, `BatchNorm3d` and `SyncBatchNorm` become a `GroupNorm` of at most 32 groups (Wu and He 2018, arXiv
      1803.08494).
    - `InstanceNorm` with running statistics becomes the same without them.
    - `inplace=True` of an activation or dropout becomes `inplace=False`.

    Learned scales and shifts are kept; running statistics are lost, so that a model trained before has to be trained
    on. Call it before the optimizer is made: parameters are new.

    Args:
        model: changed in place.

    Returns:
        The model; another object only where the model itself is a layer that is replaced.

    Raises:
        InputError: a layer without a shape yet.
    """
    if (replacement := _replacement(model)) is not None:
        click.echo(f"fix: (the model itself): {_described(model)} -> {_described(replacement)}")
        return replacement
    made: dict[nn.Module, nn.Module] = {}
    for name, owner, key, layer in list(_children(model)):
        replacement = made.get(layer) or _replacement(layer)
        if replacement is not None:
            made[layer] = replacement
            owner._modules[key] = replacement
            click.echo(f"fix: {name}: {_described(layer)} -> {_described(replacement)}")
        elif getattr(layer, "inplace", False) is True:
            layer.inplace = False  # type: ignore[assignment]
            click.echo(f"fix: {name}: {type(layer).__name__}(inplace=True) -> inplace=False")
    return model


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Name, owner, key and layer, for every place where a layer stands."""
    for prefix, owner in model.named_modules():
        for key, layer in owner._modules.items():
            if layer is not None:
                yield f"{prefix}.{key}".lstrip("."), owner, key, layer


def _replacement(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, _BatchNorm):
        _refuse_unshaped(layer)
        channels = layer.num_features
        groups = 1 if isinstance(layer, nn.BatchNorm1d) else math.gcd(_MOST_GROUPS, channels)
        made: nn.Module = nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)
    elif isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        _refuse_unshaped(layer)
        made = type(layer)(layer.num_features, eps=layer.eps, affine=layer.affine)
    else:
        return None
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            kept = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
            setattr(made, name, kept)
    return made.train(layer.training)


def _refuse_unshaped(layer: nn.Module) -> None:
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise InputError(f"{type(layer).__name__} has no shape yet: run one batch through the model first")


def _described(layer: nn.Module) -> str:
    return f"{type(layer).__name__}({layer.extra_repr()})"
