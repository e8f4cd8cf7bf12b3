"""Differentially private training of any `nn.Module`, in the manner that users of Opacus know.

    trainer = make_private(
        model, privacy=PrivacyParameters(...), steps=T, embeddings=EmbeddingSgd(...), dense=..., key=...
    )
    for batch in batches:                                   # a true Poisson sample, see `sampler`
        trainer.step(lambda: criterion(model(batch.x), batch.y))      # one loss an example, [B]
    trainer.flush()                                         # before the model is evaluated, saved or released

Embedding layers read rows with their noise from then on (`LazyRows`). Every other layer with parameters has a rule for
per-example norms (`norm_rules`), or takes the slow path (`per_example`), of which a warning names the parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.data.sampler import PoissonSampler, poisson_dp_event
from lazydp.components.train.device.placement import CPU, Placement, refuse_autocast
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.layers import Layers, trained_layers
from lazydp.components.train.mechanism.parameters import GroupNorms, PrivacyParameters
from lazydp.components.train.private_trainer import Losses, PrivateTrainer
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.embedding_layers import replaced, trained_embeddings
from lazydp.components.train.tables.embedding_tables import Mode
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.arguments import Distribution
from lazydp.kernels.noise_key import NoiseKey

# What a program that calls make_private needs besides, from one place (docs/from-opacus.md).
__all__ = [
    "DenseOptimizer",
    "EmbeddingSgd",
    "GroupNorms",
    "Losses",
    "NoiseKey",
    "PoissonSampler",
    "PrivacyParameters",
    "PrivateTrainer",
    "make_private",
    "poisson_dp_event",
    "schedules",
]

_log = logging.getLogger("lazydp.train")


def make_private(
    model: nn.Module,
    *,
    privacy: PrivacyParameters,
    embeddings: EmbeddingSgd,
    dense: DenseOptimizer,
    key: NoiseKey,
    steps: int | None = None,
    mode: Mode = "lazydp",
    noise: Distribution = "gaussian",
    allow_moving_buffers: bool = False,
    allow_unrepeatable_losses: bool = False,
) -> PrivateTrainer:
    """Prepare `model` for private training, in place.

    Training computes where the model is: call `model.to("cuda")` before. Embedding layers may stay in host memory with
    every other layer on a GPU, if the model's `forward` moves the rows that it read.

    A model is prepared once. What is refused leaves it as it was.

    Args:
        model: its embedding layers become `LazyRows`, which behave alike; batch-first throughout.
        privacy: noise, clipping and the fixed divisor of the mechanism.
        embeddings: optimizer of the embedding tables (linear, so that noise can be delayed).
        dense: optimizer of every other layer.
        key: noise key, such as `NoiseKey.generate()`. Each trainer draws under a key of its own, derived from it and
            from a nonce that its state carries, and destroyed with it.
        steps: T, the number of steps that the noise multiplier was calibrated for: step T + 1 is refused. None leaves
            it to you to stop, and to account for `PrivateTrainer.steps_done`.
        mode: `lazydp` or `dpsgd`.
        noise: `ones` for tests of exactness.
        allow_moving_buffers: train although the forward pass changes buffers (running statistics). They take in raw
            examples without clipping and noise, and no epsilon covers what they tell.
        allow_unrepeatable_losses: train although the losses of one batch cannot be computed twice alike (negatives of a
            generator of your own). What the first steps look for is then not looked for: examples that depend on each
            other by a value, weights used past their layer's call, tables read past their noise.

    Raises:
        InputError: a layer, parameter or option that cannot be trained privately, by name, layers on several GPUs, or a
            model that has a trainer already; nothing has changed then.
        UnavailableError: the model is on a GPU, and the extension was built without CUDA.
    """
    if mode == "sgd":
        raise InputError("make_private trains with privacy: for a plain run train the model itself")
    if steps is not None and steps < 1:
        raise InputError(f"steps must be at least 1, found {steps}")
    embedding_layers = trained_embeddings(model)
    if model in _prepared:
        raise InputError(
            "the model has a trainer already: make_private takes a model once; train on with the trainer that it gave, "
            "or build the model anew"
        )
    layers = trained_layers(model, without=embedding_layers.values())
    placement = _placement_of(layers, embedding_layers)
    refuse_autocast(placement.device, "make_private")
    with replaced(embedding_layers) as rows:
        trainer = PrivateTrainer(
            model,
            layers=layers,
            placement=placement,
            rows=rows,
            key=key,
            privacy=privacy,
            embeddings=embeddings,
            dense=dense,
            mode=mode,
            steps=steps,
            noise=noise,
            allow_moving_buffers=allow_moving_buffers,
            allow_unrepeatable_losses=allow_unrepeatable_losses,
        )
    _prepared.add(model)
    if trainer.slow_paths:
        _log.warning("slow path (per-example gradients are formed): %s", ", ".join(trainer.slow_paths))
    return trainer


_prepared: WeakSet[nn.Module] = WeakSet()


def _placement_of(layers: Layers, embedding_layers: Mapping[str, nn.Module]) -> Placement:
    """Where the model already is."""
    of_layers = {layer.parameter(name).device for layer in layers.values() for name in layer.names}
    of_rows = {device for layer in embedding_layers.values() for device in _devices(layer)}
    for what, devices in (("dense layers", of_layers), ("embedding layers", of_rows)):
        if len(devices) > 1:
            raise InputError(f"{what} are trained on one device, found {', '.join(sorted(map(str, devices)))}")
    return Placement.of(*(of_layers or of_rows or {CPU}), *(of_rows or of_layers or {CPU}))


def _devices(layer: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in layer.parameters(recurse=False)}
