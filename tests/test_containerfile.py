"""The Containerfile: each of its steps, run in a root file system of its own. (test_deploy.py has its linter.)"""

import json
import os
import shutil
import subprocess
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from support.containerfile import Build, can_build, instructions

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "Containerfile"
# Beside torch, which is most of it; the whole image has the base and libgomp besides.
MOST_MEGABYTES = 1650


def wheel_of(name: str, folder: Path) -> Path:
    """The wheel of an installed package, made again of its files: nothing that large is fetched for a test."""
    distribution = metadata.distribution(name)
    files = [file for file in distribution.files or () if ".." not in file.parts and "__pycache__" not in file.parts]
    [record] = [file for file in files if file.name == "RECORD"]
    [tags] = [
        line.partition(": ")[2]
        for line in str(distribution.read_text("WHEEL")).splitlines()
        if line.startswith("Tag: ")
    ]
    wheel = folder / f"{name}-{distribution.version}-{tags}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            if file != record:
                archive.write(str(distribution.locate_file(file)), str(file))
        rows = [
            [str(file), f"sha256={file.hash.value}" if file.hash else "", str(file.size or "")]
            for file in files
            if file != record
        ]
        with archive.open(str(record), "w") as opened:
            text = [",".join(row) for row in rows] + [f"{record},,"]
            opened.write(("\n".join(text) + "\n").encode())
    return wheel


def test_every_instruction_is_known_and_none_is_lost(tmp_path: Path) -> None:
    found = instructions(FILE)
    text = FILE.read_text()
    for name in ("FROM", "RUN", "COPY", "ENV"):
        assert sum(step.name == name for step in found) == sum(
            line.startswith(f"{name} ") for line in text.splitlines()
        )
    (tmp_path / "Containerfile").write_text("FROM x\nVOLUME /x\n")
    with pytest.raises(ValueError, match="unknown instruction VOLUME"):
        instructions(tmp_path / "Containerfile")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_step_runs_and_the_image_answers(tmp_path: Path) -> None:
    if not can_build():
        pytest.skip("no right to mount: the steps need a root file system of their own")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    context, wheels = tmp_path / "context", tmp_path / "wheels"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, context / name)
    wheels.mkdir()
    wheel_of("torch", wheels)
    build = Build(context, tmp_path, extra={wheels: "/wheels"})
    steps = instructions(FILE)
    ask = (
        "lazydp --version && python3 -c 'import torch, lazydp.kernels.ops' && "
        "python3 -m json.tool /opt/lazydp/sbom.cdx.json && echo --- && "
        "python3 -m pip list --format=json && echo --- && du -sm /opt/lazydp && id -u && touch ~/here"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", f"/wheels {os.environ.get('PIP_FIND_LINKS', '')}".strip())
        said = build.run(steps, last=ask)
    first, packages, rest = said.split("\n---\n")
    version, _, sbom = first.partition("\n")
    assert version.startswith("lazydp, version ")
    named = {component["name"] for component in json.loads(sbom)["components"]}
    assert {"torch", "kfp", "fastapi", "psycopg", "model-registry"} <= named
    installed = {package["name"] for package in json.loads(packages)}
    assert "lazydp" in installed
    assert not installed & {"ninja", "wheel", "cyclonedx-bom", "pytest"}
    megabytes, uid = int(rest.split()[0]), rest.split()[-1]
    assert megabytes < MOST_MEGABYTES
    assert uid == "10001"
    print(f"the environment of the image: {megabytes} MB")
