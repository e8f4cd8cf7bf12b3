"""The CUDA kernels as a library for the host, and a face of it with the signatures of `lazydp.kernels.ops`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.kernels.arguments import RowGroups, exact_grid

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "kernels" / "csrc"
SOURCES = [
    *(CSRC / "cuda" / name for name in ("noise.cu", "bags.cu", "group_rows.cu")),
    Path(__file__).parent / "entry.cpp",
]
# No -march: std::fma rounds the same in the C library as in the instruction, and CI's machines differ.
FLAGS = ["-x", "c++", "-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"]
DEFINES = ["-DLAZYDP_CUDA_HOST", f"-I{CSRC}"]
# What sanitize.sh adds; the process must then have the sanitizers loaded before it starts.
FLAGS += os.environ.get("LAZYDP_CUDA_HOST_FLAGS", "").split()
LINK_FLAGS = [flag for flag in FLAGS if flag.startswith("-fsanitize")]

NO_ROW = -1

Pointer = ctypes.c_void_p
Int = ctypes.c_int64


def _fields(text: str) -> list[tuple[str, Any]]:
    """Fields of a C struct from `pointers: a b; ints: c` written short, in order."""
    kinds = {"p": Pointer, "i": Int, "f": ctypes.c_float, "d": ctypes.c_double, "b": ctypes.c_bool}
    return [(name, kinds[kind]) for kind, name in (field.split(":") for field in text.split())]


class _CatchUp(ctypes.Structure):
    _fields_ = _fields(
        "p:weight p:momentum p:last p:rows i:count i:num_rows i:columns p:transition p:factor i:horizon p:key i:table "
        "i:step i:ones i:first_row"
    )


class _Bags(ctypes.Structure):
    _fields_ = _fields("p:order p:starts p:bag")


class _BagSum(ctypes.Structure):
    _fields_ = _fields("p:weight p:indices p:offsets p:per_lookup p:out i:num_rows i:bags i:columns")


class _BagSquaredNorms(ctypes.Structure):
    _fields_ = _fields(
        "p:indices p:offsets p:per_lookup p:grad p:workspace p:out i:features i:examples i:columns b:add"
    )


class _ScatterAdd(ctypes.Structure):
    _fields_ = _fields(
        "p:weight p:rows p:order p:starts p:bag p:per_lookup p:grad p:scale p:workspace d:alpha d:grid i:num_rows "
        "i:groups i:lookups i:bags i:columns"
    )


class _GroupRows(ctypes.Structure):
    _fields_ = _fields("p:indices p:rows p:order p:starts p:workspace i:workspace_bytes i:lookups i:num_rows")


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class CudaOnHost:
    """The launchers, run by the host's shim. Lists of distinct rows are padded, as on the device (csrc/cuda/rows.h)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("fill", "catch_up", "catch_up_and_sum", "bag_sum", "bag_sq_norms", "scatter_add", "group_rows"):
            getattr(library, f"host_{name}").restype = ctypes.c_char_p
        for name in ("bag_sq_norms", "scatter_add", "group_rows"):
            function = getattr(library, f"host_{name}_workspace")
            function.restype, function.argtypes = Int, [Int, Int]

    def set_order(self, number: int) -> None:
        """Threads in turn from the first (0), from the last (1), or shuffled (2)."""
        self._library.host_set_order(Int(number))

    def normal_(self, out: Tensor, key: Tensor, *, table: int, first_row: int, step: int) -> Tensor:
        rows, columns = out.shape
        numbers = (Int(rows), Int(columns), Int(first_row), Pointer(_at(key)), Int(table), Int(step))
        self._check(self._library.host_fill(Pointer(_at(out)), *numbers))
        return out

    def group_rows(self, indices: Tensor, *, num_rows: int) -> RowGroups:
        lookups = indices.numel()
        rows, order, starts = (torch.full((n,), -7, dtype=torch.int64) for n in (lookups, lookups, lookups + 1))
        workspace = torch.empty(self._library.host_group_rows_workspace(lookups, num_rows), dtype=torch.uint8)
        tensors = map(_at, (indices, rows, order, starts, workspace))
        self._check(
            self._library.host_group_rows(ctypes.byref(_GroupRows(*tensors, workspace.numel(), lookups, num_rows)))
        )
        return RowGroups(rows, order, starts)

    def catch_up_(self, weight: Tensor, last: Tensor, rows: Tensor, key: Tensor, **options: Any) -> None:
        self._check(self._library.host_catch_up(ctypes.byref(_catch_up(weight, last, rows, key, **options))))

    def flush_(self, weight: Tensor, last: Tensor, key: Tensor, **options: Any) -> None:
        self._check(self._library.host_catch_up(ctypes.byref(_catch_up(weight, last, None, key, **options))))

    def catch_up_bag_sum_(
        self,
        weight: Tensor,
        last: Tensor,
        groups: RowGroups,
        key: Tensor,
        bags: tuple[Tensor, Tensor, Tensor],
        per_lookup_weights: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """`bags`: indices, offsets, and the bag of every lookup."""
        indices, offsets, bag = bags
        out = torch.full((offsets.numel() - 1, weight.shape[1]), torch.nan)
        catch_up = _catch_up(weight, last, groups.rows, key, **options)
        readers = _Bags(_at(groups.order), _at(groups.starts), _at(bag))
        total = _bag_sum(weight, indices, offsets, per_lookup_weights, out)
        self._check(
            self._library.host_catch_up_and_sum(ctypes.byref(catch_up), ctypes.byref(readers), ctypes.byref(total))
        )
        return out

    def bag_sum(
        self, weight: Tensor, indices: Tensor, offsets: Tensor, per_lookup_weights: Tensor | None = None
    ) -> Tensor:
        out = torch.full((offsets.numel() - 1, weight.shape[1]), torch.nan)
        job = _bag_sum(weight, indices, offsets, per_lookup_weights, out)
        self._check(self._library.host_bag_sum(ctypes.byref(job)))
        return out

    def bag_sq_norms(
        self,
        indices: Tensor,
        offsets: Tensor,
        grad: Tensor,
        per_lookup_weights: Tensor | None = None,
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        features, examples, columns = grad.shape
        out = torch.full((examples,), torch.nan, dtype=torch.float64) if add_to is None else add_to.clone()
        workspace = torch.empty(self._library.host_bag_sq_norms_workspace(features, examples), dtype=torch.float64)
        tensors = map(_at, (indices, offsets, per_lookup_weights, grad, workspace, out))
        job = _BagSquaredNorms(*tensors, features, examples, columns, add_to is not None)
        self._check(self._library.host_bag_sq_norms(ctypes.byref(job)))
        return out

    def scatter_add_(
        self,
        weight: Tensor,
        groups: RowGroups,
        bag_of_lookup: Tensor,
        grad: Tensor,
        scale: Tensor,
        *,
        alpha: float,
        per_lookup_weights: Tensor | None = None,
        bound: float | None = None,
    ) -> None:
        lookups, columns = bag_of_lookup.numel(), weight.shape[1]
        workspace = torch.full((self._library.host_scatter_add_workspace(lookups, columns),), torch.nan)
        tensors = (
            weight,
            groups.rows,
            groups.order,
            groups.starts,
            bag_of_lookup,
            per_lookup_weights,
            grad,
            scale,
            workspace,
        )
        numbers = (
            alpha,
            0.0 if bound is None else exact_grid(bound),
            weight.shape[0],
            groups.rows.numel(),
            lookups,
            grad.shape[0],
            columns,
        )
        self._check(self._library.host_scatter_add(ctypes.byref(_ScatterAdd(*map(_at, tensors), *numbers))))

    @staticmethod
    def _check(message: bytes | None) -> None:
        if message is not None:
            raise ValueError(message.decode())


def _catch_up(
    weight: Tensor,
    last: Tensor,
    rows: Tensor | None,
    key: Tensor,
    *,
    table: int,
    step: int,
    transition: Tensor,
    factor: Tensor,
    momentum: Tensor | None = None,
    noise: str = "gaussian",
    first_row: int = 0,
) -> _CatchUp:
    num_rows, columns = weight.shape
    count = num_rows if rows is None else rows.numel()
    tensors = map(_at, (weight, momentum, last, rows))
    tail = (transition.shape[0], _at(key), table, step, noise == "ones", first_row)
    return _CatchUp(*tensors, count, num_rows, columns, _at(transition), _at(factor), *tail)


def _bag_sum(weight: Tensor, indices: Tensor, offsets: Tensor, per_lookup: Tensor | None, out: Tensor) -> _BagSum:
    return _BagSum(
        *map(_at, (weight, indices, offsets, per_lookup, out)), weight.shape[0], out.shape[0], weight.shape[1]
    )


def _build(compiler: str) -> Path:
    """The library, built once for these sources."""
    digest = hashlib.sha256(" ".join([compiler, *FLAGS]).encode())
    for path in sorted([*CSRC.glob("cuda/*"), *CSRC.glob("common/*"), *SOURCES]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_host"
    library = folder / f"cuda_host-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{library.stem}-{source.stem}-{os.getpid()}.o" for source in SOURCES]
    commands = [[compiler, *FLAGS, *DEFINES, "-c", str(a), "-o", str(b)] for a, b in zip(SOURCES, objects, strict=True)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    failures = [error for process in running if (error := process.communicate()[1]) or process.returncode]
    if failures:
        pytest.fail("the CUDA kernels do not compile for the host:\n" + "\n".join(failures))
    unfinished = library.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-shared", *LINK_FLAGS, "-o", str(unfinished), *map(str, objects)], check=True)
    unfinished.replace(library)
    for path in objects:
        path.unlink()
    return library


@pytest.fixture(scope="session")
def _library() -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    return ctypes.CDLL(str(_build(compiler)))


@pytest.fixture(params=[0, 1, 2], ids=["forward", "backward", "shuffled"])
def cuda(request: pytest.FixtureRequest, _library: ctypes.CDLL) -> CudaOnHost:
    """The kernels with the host's threads in one of three orders: no result may depend on it."""
    operators = CudaOnHost(_library)
    operators.set_order(request.param)
    return operators
