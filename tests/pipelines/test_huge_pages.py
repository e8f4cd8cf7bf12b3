"""Large tensors of the command line lie in huge pages where the kernel gives them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazydp.components.shared import huge_pages

# What the kernel says of a tensor of 64 MiB, made after the command line has begun.
_PROGRAM = """
import sys
from lazydp.pipelines import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
import torch
tensor = torch.ones(1 << 24)
lines = open("/proc/self/smaps").read().splitlines()
print(sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(not huge_pages.kernel_gives_huge_pages(), reason="the kernel gives none")
@pytest.mark.parametrize(("asked", "wanted"), [(None, True), ("0", False)])
def test_the_command_line_asks_and_the_user_decides(asked: str | None, *, wanted: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != huge_pages.VARIABLE}
    if asked is not None:
        environment[huge_pages.VARIABLE] = asked
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True)
    kibibytes = int(done.stdout.splitlines()[-1])
    if wanted:
        assert kibibytes >= 32 << 10  # half of it at least: memory may be in pieces
    elif "[always]" not in huge_pages._KERNEL.read_text():
        assert kibibytes < 32 << 10


@pytest.mark.parametrize(("kernel", "wanted"), [("always [madvise] never", "1"), ("always madvise [never]", None)])
def test_a_kernel_without_them_is_not_asked(
    kernel: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, "_KERNEL", tmp_path / "enabled")
    # Set, then deleted: so that monkeypatch restores it after the test, whatever the function does.
    monkeypatch.setenv(huge_pages.VARIABLE, "0")
    monkeypatch.delenv(huge_pages.VARIABLE)
    huge_pages.prefer_huge_pages()
    assert not huge_pages.huge_pages_in_use()  # no such file: another system
    (tmp_path / "enabled").write_text(kernel)
    huge_pages.prefer_huge_pages()
    assert os.environ.get(huge_pages.VARIABLE) == wanted
    assert huge_pages.huge_pages_in_use() == (wanted is not None)
