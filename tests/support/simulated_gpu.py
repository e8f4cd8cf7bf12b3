"""A GPU that isn't there: CPU tensors that behave like tensors on `cuda:0`, and an account of what crosses the border.

Whatever touches such a tensor passes `OnGpu.__torch_dispatch__`, which

- refuses an operation that mixes it with a tensor of the host (but for numbers, as CUDA does),
- counts what makes the host wait (`item`, `bool`, `nonzero`, a number that is copied, ...) and the copies across,
- gives the answers of the CUDA operators, padded lists of rows included, and takes the key on the host only.

A copy without blocking is not done when the call returns: to the host it leaves garbage until somebody waits, and from
the host its source must be pinned and must not change until then. To autograd and to C++ the tensors stay CPU tensors,
so that any build of torch runs this; only Python's `device`, `is_cpu` and `is_cuda` say otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

_aten, _lazydp = torch.ops.aten, torch.ops.lazydp
_SYNCHRONISING = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
}
# What takes a number as an argument of its kernel. Others (`where`) copy it to the device, and the host waits.
_TAKES_NUMBERS = {"add", "sub", "rsub", "mul", "div", "pow", "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum"}
_READS = {"tolist", "numpy", "__array__"}
_CUDA_OPERATORS = {
    "normal_",
    "flush_",
    "foreach_group_rows",
    "foreach_catch_up_",
    "foreach_bag_sum",
    "foreach_catch_up_bag_sum_",
    "foreach_bag_sq_norms",
    "foreach_scatter_add_",
}


@dataclass(frozen=True)
class Crossing:
    """One copy across the border.

    Attributes:
        to: "gpu" or "host".
        bytes: copied.
        blocking: whether the host waits for it.
    """

    to: str
    bytes: int
    blocking: bool


class OnGpu(Tensor):
    """A tensor on the simulated GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        gpu = SimulatedGpu.current
        assert gpu is not None, "a simulated tensor outlived its GPU"
        return gpu.run(func, args, kwargs or {})


def _on_gpu(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, OnGpu) else torch.Tensor._make_subclass(OnGpu, tensor, False)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Across(torch.autograd.Function):
    """A copy across that a gradient travels back."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


class _Stream:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu

    def synchronize(self) -> None:
        self._gpu.wait()


class SimulatedGpu(TorchFunctionMode):
    """While entered, `cuda` is this GPU.

    Attributes:
        crossings: copies across, in their order.
        waits: how often the host waited for the stream.
        reads: what made the host wait otherwise, by name.
        launches: names of the operators that ran on the GPU.
    """

    current: SimulatedGpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self._pinned: dict[int, Any] = {}
        self._arriving: list[tuple[Tensor, Tensor]] = []
        self._leaving: list[tuple[Tensor, Tensor]] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.crossings: list[Crossing] = []
        self.waits = 0
        self.reads: list[str] = []
        self.launches: list[str] = []

    def sent(self) -> int:
        """Bytes that went to the GPU."""
        return sum(crossing.bytes for crossing in self.crossings if crossing.to == "gpu")

    def brought(self) -> int:
        """Bytes that came to the host."""
        return sum(crossing.bytes for crossing in self.crossings if crossing.to == "host")

    def __enter__(self) -> Self:
        assert SimulatedGpu.current is None
        SimulatedGpu.current = self
        self._patched = contextlib.ExitStack()
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: _Stream(self),
            "synchronize": lambda device=None: self.wait(),
            "is_current_stream_capturing": lambda: False,
        }.items():
            self._patched.enter_context(_replaced(torch.cuda, name, value))
        from lazydp.kernels import ops

        self._patched.enter_context(_replaced(ops, "built_with_cuda", lambda: True))
        # `model.to` otherwise puts the new data into the old parameter, whose class is that of the host.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patched.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patched.close()
        SimulatedGpu.current = None

    def wait(self) -> None:
        """What the stream was asked for is done."""
        self.waits += 1
        self._settle()

    def _settle(self) -> None:
        for source, sent in self._arriving:
            assert torch.equal(source.view(-1).view(torch.uint8), sent), "a copy in flight had its source overwritten"
        for target, contents in self._leaving:
            target.copy_(contents)
        self._arriving.clear()
        self._leaving.clear()

    # What Python asks of torch: where tensors are made, moved and read.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, *args, **kwargs)
        if func is Tensor.pin_memory:
            return self._pin(args[0].clone())
        if func is Tensor.is_pinned:
            return self._is_pinned(args[0])
        if getattr(func, "__name__", "") in _READS and isinstance(args[0], OnGpu):
            self._read(func.__name__)
            return func(self._fetch(args[0]), *args[1:], **kwargs)
        pinned = kwargs.pop("pin_memory", False)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            assert not pinned
            made = func(*args, **{**kwargs, "device": CPU})
            self.launches.append(func.__name__)
            return _on_gpu(made)
        made = func(*args, **kwargs)
        return self._pin(made) if pinned else made

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if func is Tensor.cpu:
            device, dtype, non_blocking = CPU, None, False
        elif func is Tensor.cuda:
            device, dtype, non_blocking = GPU, None, kwargs.get("non_blocking", False)
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        from_gpu = isinstance(tensor, OnGpu)
        to_gpu = from_gpu if device is None else device.type == "cuda"
        if from_gpu == to_gpu:
            return tensor.to(dtype=dtype or tensor.dtype, copy=copy)
        there, back = (self._fetch, self._send) if from_gpu else (self._send, self._fetch)
        arrived: Tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            arrived = _Across.apply(tensor, there, back)  # type: ignore[no-untyped-call]
        else:
            arrived = there(tensor.detach(), non_blocking=non_blocking)
        return arrived if dtype is None else arrived.to(dtype)

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _send(self, tensor: Tensor, *, non_blocking: bool = False) -> Tensor:
        flies = non_blocking and self._is_pinned(tensor)
        self.crossings.append(Crossing("gpu", _bytes(tensor), not flies))
        copied = tensor.detach().clone()
        if flies:
            self._arriving.append((tensor, copied.view(-1).view(torch.uint8).clone()))
        return _on_gpu(copied)

    def _fetch(self, tensor: Tensor, *, non_blocking: bool = False) -> Tensor:
        self.crossings.append(Crossing("host", _bytes(tensor), not non_blocking))
        contents, target = (torch.empty(tensor.shape, dtype=tensor.dtype) for _ in range(2))
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            contents.copy_(tensor)
        if not non_blocking:
            self._settle()
            return contents
        target.view(-1).view(torch.uint8).fill_(0xA5)
        self._leaving.append((target, contents))
        return target

    def _read(self, name: str) -> None:
        self.reads.append(name)
        self._settle()

    # What reaches the operators.

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator that was given a tensor on the GPU."""
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        of_host = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        if func.namespace == "lazydp":
            return self._lazydp(func, args, of_host)
        if func is _aten.copy_.default and of_host:
            return self._copy(*args)
        if any(tensor.dim() for tensor in of_host):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got some on cuda:0 and on cpu"
            )
        copies_number = of_host and func._schema.name.split("::")[1].rstrip("_") not in _TAKES_NUMBERS
        if copies_number or func in _SYNCHRONISING or _has_unknown_size(func, args, kwargs):
            self._read(str(func))
        self.launches.append(str(func))
        with torch._C._DisableTorchDispatch():
            result = func(*args, **kwargs)
        return tree_map_only(Tensor, _on_gpu, result)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        with torch._C._DisableTorchDispatch():
            if isinstance(target, OnGpu):
                target.copy_(self._send(source, non_blocking=non_blocking) if source.dim() else source)
            else:
                target.copy_(self._fetch(source))
        return target

    def _lazydp(self, func: Any, args: Any, of_host: list[Tensor]) -> Any:
        """The bindings of `csrc/cuda/binding.cpp`, in what they take and give."""
        name = func._schema.name.split("::")[1]
        if name not in _CUDA_OPERATORS:
            raise NotImplementedError(f"lazydp::{name} has no kernel for CUDA")
        expected = [argument.name for argument in func._schema.arguments]
        for argument, values in zip(expected, args, strict=False):
            for value in values if isinstance(values, (list, tuple)) else [values]:
                if isinstance(value, Tensor) and isinstance(value, OnGpu) == (argument == "key"):
                    where = "a CPU tensor" if argument == "key" else "a tensor on cuda:0"
                    raise ValueError(f"{argument}: expected {where}")
                if isinstance(value, Tensor) and not value.is_contiguous():
                    raise ValueError(f"{argument}: expected a contiguous tensor; call .contiguous()")
        self.launches.append(name)
        given = dict(zip(expected, args, strict=False))
        with torch._C._DisableTorchDispatch():
            if name == "foreach_group_rows":
                padded = [_padded(*parts) for parts in zip(*func(*args), strict=True)]
                return tuple([_on_gpu(part) for part in parts] for parts in zip(*padded, strict=True))
            result = func(*_without_padding(given).values())
        return tree_map_only(Tensor, _on_gpu, result)


def _has_unknown_size(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host has to wait to know how large the result is."""
    if func is _aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


def _padded(rows: Tensor, order: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As docs/cuda.md says: as long as the lookups, with -1 and N after the last distinct row."""
    lookups = order.shape[0]
    of_rows, of_starts = torch.full((lookups,), -1), torch.full((lookups + 1,), lookups)
    of_rows[: rows.shape[0]], of_starts[: starts.shape[0]] = rows, starts
    return of_rows, order, of_starts


def _without_padding(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("rows") is None:
        return given
    counts = [int((rows >= 0).sum()) for rows in given["rows"]]
    given["rows"] = [rows[:count] for rows, count in zip(given["rows"], counts, strict=True)]
    if "starts" in given:
        given["starts"] = [starts[: count + 1] for starts, count in zip(given["starts"], counts, strict=True)]
    return given


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
