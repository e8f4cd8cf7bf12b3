"""A cluster for the tests of compiled packages, and the data that its pipelines read."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from kfp.dsl import pipeline_task

from lazydp.pipelines import package, recommender
from lazydp.pipelines.cli import cli
from support.kfp_backend import Backend, BackendRun, PodHost
from support.tiny import SAMPLE_CONFIG

# What pods import; the server of pods has it ready.
_PRELOAD = (
    "lazydp.components.ingest.ingest",
    "lazydp.components.export.artifact",
    "lazydp.components.evaluate.evaluate",
    "lazydp.components.finish.finish",
    "lazydp.components.train.run.train",
    "lazydp.components.gate.gate",
    "lazydp.components.budget.storage.sql",
    "sqlalchemy.dialects.sqlite",
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "torch._dynamo",
    "support.warmed",
)


@dataclass
class TinyCluster:
    """A backend with a claim, a secret and a compiled pipeline, and a sample to run it on."""

    folder: Path
    backend: Backend
    parameters: dict[str, Any]
    mount: Path
    packages: int = 0

    @property
    def ledger(self) -> str:
        """URL of the ledger that the secret names."""
        return f"sqlite:///{self.folder / 'ledger.db'}"

    def compiled(self, *options: str, cluster: dict[str, Any] | None = None) -> Path:
        """The package that `lazydp pipeline compile` writes."""
        self.packages += 1
        file, own = self.folder / f"pipeline-{self.packages}.yaml", self.folder / "cluster.yaml"
        own.write_text(yaml.safe_dump({"runs": {"mount": str(self.mount)}, "check_release": False, **(cluster or {})}))
        result = CliRunner().invoke(cli, ["pipeline", "compile", "--out", str(file), "--cluster", str(own), *options])
        assert result.exit_code == 0, result.output
        return file

    def run(self, package: Path, **more: Any) -> BackendRun:
        """Run it on the sample."""
        kill = more.pop("kill", None)
        return self.backend.run(package, {**self.parameters, **more}, kill=kill)


class CompiledOnce:
    """Compiles a pipeline once for the same options: what kfp makes of them does not change."""

    def __init__(self) -> None:
        self._pipelines: dict[str, Any] = {}
        self._packages: dict[str, str] = {}
        self._compile = package.compile_package

    def named(self, pipeline: str, **options: Any) -> tuple[str, dict[str, Any]]:
        """Stands for the pipeline until it is known whether it has to be made."""
        return pipeline, options

    def compile(self, pipeline: tuple[str, dict[str, Any]], file: Path, **options: Any) -> None:
        """As `compile_package`."""
        name, asked = pipeline
        made = repr((name, asked["compare"], asked["cluster"].model_dump_json()))
        if made not in self._pipelines:
            self._pipelines[made] = MAKERS[name](**asked)
        compiled = repr((made, options))
        if compiled in self._packages and file.suffix == ".yaml":
            file.write_text(self._packages[compiled])
        else:
            self._compile(self._pipelines[made], file, **options)
            self._packages[compiled] = file.read_text()


MAKERS = dict(recommender.PIPELINES)


@pytest.fixture(scope="package", autouse=True)
def compiled_once() -> Iterator[None]:
    """For all tests of this folder."""
    once = CompiledOnce()
    with pytest.MonkeyPatch.context() as patch:
        for name in MAKERS:
            patch.setitem(recommender.PIPELINES, name, partial(once.named, name))  # type: ignore[arg-type]
        patch.setattr(package, "compile_package", once.compile)
        # kfp looks up its caller's name at each setting of a task, with the lines of source of the whole stack. Below
        # pytest the stack is so deep that this took most of the time of a compilation. The name is found without lines.
        frames = SimpleNamespace(stack=partial(inspect.stack, context=0))
        patch.setattr(pipeline_task, "inspect", frames)
        yield


@pytest.fixture(scope="session")
def pod_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodHost]:
    """Starts the processes of pods."""
    with PodHost(tmp_path_factory.mktemp("pods"), preload=_PRELOAD) as host:
        yield host


@pytest.fixture(scope="session")
def tiny_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 users, 40 items, 600 interactions."""
    from lazydp.components.sample.sample import SampleSize, make_sample

    folder = tmp_path_factory.mktemp("sample") / "sample"
    make_sample(folder, size=SampleSize(users=60, items=40, interactions=600))
    return folder


@pytest.fixture
def cluster(pod_host: PodHost, tiny_sample: Path, tmp_path: Path) -> TinyCluster:
    """An empty cluster: nothing was run there."""
    secrets = {"lazydp-ledger": {"url": f"sqlite:///{tmp_path / 'ledger.db'}", "secret": "0123456789abcdef" * 4}}
    backend = Backend(tmp_path / "backend", pod_host, claims=("lazydp-runs",), secrets=secrets)
    spec = yaml.safe_load((tiny_sample / "spec.yaml").read_text()) | {"max_examples_per_user": 4}
    for table in ("users", "items"):
        if table in spec:
            spec[table] = {**spec[table], "path": str(tiny_sample / f"{table}.parquet")}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(SAMPLE_CONFIG))
    parameters = {
        "input_uri": str(tiny_sample / "interactions.parquet"),
        "budget_epsilon": 20.0,
        "operator": "nightly",
    }
    # The same path in every test, for packages that are compiled once; volumes are there while a pod lives.
    return TinyCluster(tmp_path, backend, parameters, mount=tiny_sample.parent / "mnt" / "runs")
