"""The source distribution holds what is tracked, and a wheel built from it imports where nothing else is installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What only the repository needs: how it is checked, and links for type checkers.
REPOSITORY_ONLY = (".ci/", ".git", ".typecheck/", ".clang-format", ".dockerignore", ".pre-commit-config.yaml")
# What a wheel has no use for: the extension is compiled, and people read the documents elsewhere.
SOURCES_ONLY = ("kernels/csrc/", "README.md", "OWNERS")
LEFT_OUT = "kernels/csrc/common/chacha20.h"
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a checkout: there are no tracked files to compare with")
    # A file that was removed and not yet committed is not missing from the distribution.
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def expected(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.startswith(REPOSITORY_ONLY)}


def build(kind: str, source: Path, out: Path) -> Path:
    """The sdist, or the wheel, of `source`, built as pip builds it, with the packages that are installed here."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=kind), str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


def copied(names: Iterable[str], folder: Path) -> Path:
    """A checkout of its own: building writes beside the sources."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return folder


def held(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def test_the_source_distribution_holds_every_tracked_file(tmp_path: Path) -> None:
    """With its negative control: a header that the manifest leaves out is missing, and nothing else is."""
    names = expected(tracked())
    source = copied(names, tmp_path / "source")
    with (source / "MANIFEST.in").open("a") as manifest:
        manifest.write(f"exclude {LEFT_OUT}\n")
    found = held(build("sdist", source, tmp_path / "out"))
    assert names - found == {LEFT_OUT}
    made = {"PKG-INFO", "setup.cfg", *(name for name in found if ".egg-info/" in name)}
    assert found - names - made == set(), "held, but not tracked"


def test_the_version_is_written_in_one_place() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    places = ["Containerfile", "CITATION.cff", "setup.py", "components/shared/image.py", "api/__init__.py", "README.md"]
    assert [place for place in places if version in (ROOT / place).read_text()] == []


def test_make_installs_every_extra() -> None:
    """Else the tests of what an extra brings are skipped, in CI as well."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"^EXTRAS := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    # Large, and used by slow tests alone, for which make installs it.
    assert sorted([*named.split(","), "spark"]) == sorted(extras)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_of_the_source_distribution_imports_in_an_empty_environment(tmp_path: Path) -> None:
    source = copied(expected(tracked()), tmp_path / "source")
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, tmp_path / "wheel")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = ("api/", "components/", "kernels/", "pipelines/", "service/")
    packaged = {name for name in expected(tracked()) if name.startswith(folders)}
    missing = {name for name in packaged if f"lazydp/{name}" not in names}
    missing = {name for name in missing if not any(part in name for part in SOURCES_ONLY)}
    assert missing == set(), "tracked, and not in the wheel"

    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    program = "import lazydp.api as api; print(api.__version__, len(dir(api)), api.__file__)"
    done = subprocess.run([str(python), "-I", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    version, exported, file = done.stdout.split()
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert int(exported) > 10
    assert Path(file).is_relative_to(tmp_path / "empty")

    # With the dependencies beside it, and nothing of this checkout: every name loads, and the kernels answer.
    (site,) = (tmp_path / "empty" / "lib").glob("python3*/site-packages")
    dependencies = Path(pytest.__file__).parents[1]
    program = (
        "import torch, lazydp.api as api; [getattr(api, name) for name in dir(api)];"
        "from lazydp.kernels import ops; print(ops.__file__); print(ops.simd_level())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(dependencies)])}
    command = [str(python), "-S", "-W", "ignore", "-c", program]  # -S: no editable install of this checkout
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(site)
