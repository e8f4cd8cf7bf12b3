"""What tests of every folder share: a small dataset that went through the real ingest, and a GPU, real or simulated.

Helpers live in `tests/support`. They are imported by the fixtures that need them, for tests also run on GPU machines
that lack some of their libraries.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.simulated_gpu import SimulatedGpu
    from support.tiny import Tiny

# Before torch is imported, here and in the processes of tests. Workers share the cores, so a second thread waits for a
# core longer than it computes a few rows. Tests of what threads could change ask for them (`two_threads`).
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Begun first, so that no process is left alone with one of them at the end (`make test` keeps files whole).
# The first three stand for the files that `TOGETHER` names beside them.
LONGEST = (
    "test_quickstart.py",
    "pipelines/test_recommender.py",
    "service/console/test_console.py",
    "components/train/engine/test_equivalence.py",
    "components/budget/accounting/test_epsilon.py",
    "adversary/test_sums.py",
    "components/export/test_export.py",
    "components/train/run/test_train.py",
    "components/audit/test_audit.py",
    "components/tune/test_tune.py",
    "components/export/test_released_counts.py",
    "components/export/test_publish.py",
    "test_programs.py",
    "adversary/service/test_versions.py",
    "components/onepass/test_start.py",
    "api/test_lightning.py",
    "adversary/service/test_connections.py",
    "components/audit/test_audited_release.py",
    "test_compatibility.py",
    "service/routes/test_openapi.py",
)

# Files that share what takes seconds to start run in one worker, one after another: a server of pods, with kfp; a
# PostgreSQL server, and a server of forks; a browser.
TOGETHER = {
    "pipelines/": "pods",
    "components/budget/ledger/": "ledgers and forks",
    "components/budget/storage/": "ledgers and forks",
    "components/export/test_killed_commands.py": "ledgers and forks",
    "components/gate/": "ledgers and forks",
    "components/train/run/test_rank_processes.py": "ledgers and forks",
    "components/train/run/test_resume_kills.py": "ledgers and forks",
    "service/serving/test_restarts.py": "ledgers and forks",
    "service/test_tls.py": "ledgers and forks",
    "test_quickstart.py": "ledgers and forks",
    "service/console/": "browser",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Units of work are files, or files together; None where another distribution was asked for."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    def unit_of(nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        below = file.removeprefix("tests/")
        return next((unit for start, unit in TOGETHER.items() if below.startswith(start)), file)

    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = unit_of
    return scheduler


def pytest_collection() -> None:
    """Import without looking for garbage: of a million objects that all stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Never look through what was imported; what tests make is collected as always."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files of tests by how long they take, as far as that matters."""
    order = {name: place for place, name in enumerate(LONGEST)}
    root = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(root).as_posix(), len(order)))


@pytest.fixture(scope="session", autouse=True)
def nothing_of_the_developer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is not told where its ledger and its cache are keeps them with the test run, not in the developer's home.

    The cache (`shared/cache_folder.py`) is of all workers together, as of all processes of a machine.
    """
    base = tmp_path_factory.getbasetemp()
    cache = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAZYDP_CACHE", str(cache / "cache"))
        for variable, folder in (("XDG_DATA_HOME", "data"), ("XDG_STATE_HOME", "state")):
            patch.setenv(variable, str(base / folder))
        yield


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """As a program on two cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 users, 40 items, 900 interactions (`support.tiny.write_interactions`), ingested."""
    from lazydp.components.ingest.ingest import ingest
    from support.tiny import TINY_SPEC, write_interactions

    folder = tmp_path_factory.mktemp("tiny")
    write_interactions(folder / "interactions.parquet")
    (folder / "spec.yaml").write_text(TINY_SPEC)
    ingest([str(folder / "interactions.parquet")], str(folder / "spec.yaml"), folder / "dataset")
    return folder / "dataset"


@pytest.fixture
def tiny(tiny_dataset: Path, tmp_path: Path) -> Tiny:
    """The tiny dataset, with a ledger of the test's own."""
    from support.tiny import Tiny

    return Tiny(tiny_dataset, tmp_path)


@pytest.fixture
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """A GPU that isn't there (`support.simulated_gpu`), for as long as the test lasts."""
    from support.simulated_gpu import SimulatedGpu

    with SimulatedGpu() as gpu:
        yield gpu


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> SimulatedGpu | None:
    """The GPU of this machine, where torch and the extension can use it (then None); else a simulated one."""
    import torch

    from lazydp.kernels import ops

    if torch.cuda.is_available() and ops.built_with_cuda():
        return None
    simulated: SimulatedGpu = request.getfixturevalue("simulated_gpu")
    return simulated
