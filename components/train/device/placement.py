"""Where a step computes, and the one way in which tensors cross between host and GPU.

    device    table_device
    cpu       cpu           everything on the host
    cuda:0    cuda:0        everything on the GPU but the noise key and the recursion of the skip-ahead table
    cuda:0    cpu           tables in host memory, the dense layers on the GPU: the system of the LazyDP paper

Placement is no part of the mechanism: noise has the same bits everywhere, and the accounting never sees it. Sums are
rounded in another order, so that a run is repeated to the same bits by the same placement only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.kernels import ops

CPU = torch.device("cpu")

# Allocations of CUDA begin at such multiples; a tensor within a pack then is as well aligned as one of its own.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Placement:
    """Devices of a run; made by `Placement.of`.

    Attributes:
        device: where the dense layers compute.
        table_device: where the tables live, with the record of each row's pending noise: the same, or the CPU.

    Raises:
        InputError: tables on another GPU than the dense layers, or on a GPU with the dense layers on the CPU.
    """

    device: torch.device
    table_device: torch.device

    def __post_init__(self) -> None:
        if self.table_device not in (self.device, CPU):
            raise InputError(
                f"tables live with the dense layers or in host memory: expected table_device {self.device} or cpu, "
                f"found {self.table_device}"
            )

    @classmethod
    def of(cls, device: torch.device | str = CPU, table_device: torch.device | str | None = None) -> Self:
        """The placement of these names: `cpu`, `cuda` (the current GPU) or `cuda:N`.

        Args:
            device: of the dense layers.
            table_device: of the tables; that of the dense layers where None.

        Raises:
            InputError: no such device, or devices that don't go together.
            UnavailableError: a GPU was asked for, and there is none, or the extension was built without CUDA.
        """
        layers = _checked(device)
        return cls(layers, layers if table_device is None else _checked(table_device))


HOST = Placement(CPU, CPU)
"""Everything on the CPU."""


def _checked(name: torch.device | str) -> torch.device:
    """The device called `name`, with its index, as tensors that live there have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"no device {name!r}: expected cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise InputError(f"no kernels for device {name!r}: expected cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UnavailableError(f"device {name} was asked for, and torch finds no NVIDIA GPU here: use cpu")
    if not ops.built_with_cuda():
        raise UnavailableError(
            f"device {name} was asked for, and the extension was built without CUDA: build it with LAZYDP_CUDA=1"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UnavailableError(f"device {name} was asked for, and there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def wait(device: torch.device) -> None:
    """Let the host wait until `device` has done what was asked of it; returns at once for the CPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors on `device`; those that live there already are returned as they are.

    To a GPU they travel as one pack and nobody waits. From a GPU the host waits once, for all of them.
    """
    away = [tensor for tensor in tensors if tensor.device != device]
    if not away:
        return list(tensors)
    arrived = iter(_to_host(away) if device.type == "cpu" else _to_gpu(away, device))
    return [tensor if tensor.device == device else next(arrived) for tensor in tensors]


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    # torch makes the targets of such copies in pinned memory; what they hold before the wait is undefined.
    copies = [tensor.to(CPU, non_blocking=True) for tensor in tensors]
    wait(tensors[0].device)
    return copies


def _to_gpu(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """One pinned buffer and one copy for all of them: a copy each would cost more in launches than in bytes.

    The buffer is new at every call and never written again: torch gives its memory to nobody before the copy from it is
    done, so that no copy in flight can be overwritten.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    ends = list(itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
    places = [slice(start, start + size) for start, size in zip([0, *ends], sizes, strict=False)]
    staged = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    for tensor, place in zip(tensors, places, strict=True):
        staged[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    sent = staged.to(device, non_blocking=True)
    return [sent[place].view(tensor.dtype).view(tensor.shape) for tensor, place in zip(tensors, places, strict=True)]


def refuse_rounded_products(device: torch.device) -> None:
    """Refuse matrix products of float32 in fewer bits than float32 has (TF32, bfloat16).

    Norms that fall short let a unit contribute more than the clipping norm, beyond what the noise covers.

    Raises:
        InputError: torch was told to use them on `device`.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision: str = backend.matmul.fp32_precision
    if precision not in ("ieee", "none"):
        raise InputError(
            f"matrix products of float32 on {device.type} are set to {precision}: norms would fall short of the truth "
            'and clipping would not hold; call torch.set_float32_matmul_precision("highest")'
        )


def refuse_autocast(device: torch.device, what: str) -> None:
    """Refuse products in half precision, which no norm is made for.

    Raises:
        InputError: `torch.autocast` is on for `device`; the message says that `what` is called in it.
    """
    if torch.is_autocast_enabled(device.type):
        raise InputError(
            f"{what} is called under torch.autocast ({torch.get_autocast_dtype(device.type)}): private training is "
            "float32 throughout, leave it out"
        )
