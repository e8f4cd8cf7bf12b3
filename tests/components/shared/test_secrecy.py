"""A process that holds a key leaves no core dump."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, os, resource, sys
from pathlib import Path
from lazydp.components.train.run.folder import RunFolder
before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
with RunFolder.locked(Path(sys.argv[1]), create=True):
    print(before, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_whoever_opens_a_run_leaves_no_core_dump(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == ["1", "0", "0"]
