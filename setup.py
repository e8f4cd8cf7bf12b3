"""Builds the extensions `lazydp.kernels._C` and `_rows`; everything else is in pyproject.toml.

CUDA sources are compiled in when LAZYDP_CUDA=1, or when it is unset and both CUDA_HOME and a CUDA build of torch
are there. Never decided by torch.cuda.is_available(): images are built on machines without a GPU.
"""

import os
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

CSRC = Path("kernels/csrc")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def extension() -> CppExtension:
    switch = os.environ.get("LAZYDP_CUDA")
    with_cuda = switch == "1" or (switch is None and CUDA_HOME is not None and torch.version.cuda is not None)
    sources = sorted(str(path) for path in CSRC.glob("cpu/*.cpp"))
    cxx = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", STABLE_ABI]
    if not with_cuda:
        return CppExtension(
            "lazydp.kernels._C",
            sources,
            include_dirs=[str(CSRC.absolute())],
            extra_compile_args={"cxx": cxx},
            py_limited_api=True,
        )
    sources += sorted(str(path) for pattern in ("cuda/*.cu", "cuda/*.cpp") for path in CSRC.glob(pattern))
    return CUDAExtension(
        "lazydp.kernels._C",
        sources,
        include_dirs=[str(CSRC.absolute())],
        extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": ["-O3", "-std=c++20", "--fmad=false"]},
        py_limited_api=True,
    )


def rows_extension() -> Extension:
    """What reads logs: without torch, which takes seconds to load."""
    return Extension(
        "lazydp.kernels._rows",
        sorted(str(path) for path in CSRC.glob("rows/*.cpp")),
        include_dirs=[str(CSRC.absolute())],
        depends=[str(path) for pattern in ("rows/*.h", "rows/*.inc") for path in sorted(CSRC.glob(pattern))],
        extra_compile_args={"cxx": ["-O3", "-std=c++20", "-fvisibility=hidden"]},  # type: ignore[arg-type]
        language="c++",
        py_limited_api=True,
    )


class AtomicBuild(BuildExtension):
    """Links and copies under another name, then renames: a killed build leaves no half-written library that imports."""

    _unfinished = ""

    def get_ext_fullpath(self, ext_name: str) -> str:
        """Where the library goes; while it is being linked, beside that."""
        return self._unfinished or super().get_ext_fullpath(ext_name)

    def build_extension(self, ext: Extension) -> None:
        """Link to the unfinished name (which is never there, so never taken for up to date), then rename."""
        finished = self.get_ext_fullpath(ext.name)
        self._unfinished = _unfinished_name(finished)
        try:
            super().build_extension(ext)
            Path(self._unfinished).replace(finished)
        finally:
            self._unfinished = ""

    def copy_file(self, infile: str, outfile: str, *args: Any, **kwargs: Any) -> tuple[str, int]:
        """Copy to the unfinished name (the library into the source tree, with `--inplace`), then rename."""
        unfinished = _unfinished_name(outfile)
        super().copy_file(infile, unfinished, *args, **kwargs)
        Path(unfinished).replace(outfile)
        return outfile, 1


def _unfinished_name(library: str) -> str:
    path = Path(library)
    return str(path.with_name(f"{path.stem}.unfinished{path.suffix}"))


setup(
    ext_modules=[extension(), rows_extension()],
    cmdclass={"build_ext": AtomicBuild.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
