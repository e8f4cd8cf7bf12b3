"""Ray and Spark give the dataset of the local engine, whatever dies; errors are one line, and nothing private stays."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.distributed import ingest_on
from lazydp.components.ingest.engines import engine_named
from lazydp.components.ingest.ingest import IngestOptions, ingest
from lazydp.components.ingest.ray_engine import RayEngine
from lazydp.components.sample.sample import make_sample
from lazydp.components.shared.errors import InputError, UnavailableError
from support.killing_engine import KillingEngine

TESTS = Path(__file__).parents[2]
SPEC = (
    "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\ntimestamp: t\nhistory: {max_length: 20}\n"
    "item: {column: i, vocabulary: {kind: integer, size: 1000}}\nmax_examples_per_user: 9\n"
)
ENGINES = {"ray": "ray", "spark": "pyspark"}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra lazydp[ray] is not installed")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine that is installed."""
    name: str = request.param
    if importlib.util.find_spec(ENGINES[name]) is None or (name == "spark" and shutil.which("java") is None):
        pytest.skip(f"the extra lazydp[{name}] is not installed, or no java")
    return name


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder for private files, as TMPDIR: Ray makes sockets in it, whose paths have to be short."""
    folder = Path("/tmp") / f"e{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


def write_log(folder: Path, rows: int, *, group: int) -> Path:
    """A log whose first user has half of the rows."""
    generator = np.random.default_rng(0)
    users = np.where(generator.random(rows) < 0.5, 0, generator.integers(0, 1 + rows // 50, rows))
    log = pa.table({"u": users, "i": generator.integers(0, 1000, rows), "t": generator.integers(0, 99, rows)})
    pq.write_table(log, folder / "log.parquet", row_group_size=group)
    (folder / "spec.yaml").write_text(SPEC)
    return folder / "log.parquet"


def files(out: Path) -> dict[str, bytes]:
    """The files of a dataset but its manifest, after all their digests were compared."""
    EncodedDataset.open(out)
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.arrow")}


@needs_ray
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray", "ignore::ResourceWarning")
@pytest.mark.parametrize("times", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["undisturbed", "workers killed"])
def test_ray_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    # Each start of Ray, and each process that works, takes some seconds of a processor: one small ingest has to do.
    parts = 4 if times else 1
    log = write_log(tmp_path, 4000, group=500)
    ingest([str(log)], SPEC, tmp_path / "local", IngestOptions(parts=parts, keep_rows=True))
    (tmp_path / "killed").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "180")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        killed = KillingEngine(RayEngine(cluster.address, 1), tmp_path / "killed", encode=times, assemble=times)
        options = IngestOptions(keep_rows=True)
        ingest_on(killed, [str(log)], SPEC, tmp_path / "out", options, parts=parts, piece_rows=2000)
    finally:
        cluster.shutdown()
    assert len(list((tmp_path / "killed").iterdir())) == 2 * times
    assert files(tmp_path / "out") == files(tmp_path / "local")


def lazydp(arguments: Sequence[str], tmp: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with `tmp` for its private files."""
    environment = os.environ | {"TMPDIR": str(tmp)} | variables
    return subprocess.run(program(arguments), env=environment, capture_output=True, text=True, check=False)


def program(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", "from lazydp.pipelines.cli import main; main()", *arguments]


def arguments_for(folder: Path, engine: str, *more: str) -> list[str]:
    words = ["ingest", "--input", str(folder / "log.parquet"), "--spec", str(folder / "spec.yaml")]
    return [*words, "--out", str(folder / "out"), "--engine", engine, "--workers", "2", *more]


def private_files(tmp: Path) -> list[Path]:
    return [path for path in tmp.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_built_in_sample(engine: str, tmp_path: Path, short_tmp: Path) -> None:
    make_sample(tmp_path / "sample")
    spec, log = tmp_path / "sample" / "spec.yaml", tmp_path / "sample" / "interactions.parquet"
    made = ingest([str(log)], str(spec), tmp_path / "local")
    words = ["ingest", "--input", str(log), "--spec", str(spec), "--out", str(tmp_path / "out"), "--engine", engine]
    ran = lazydp([*words, "--parts", "8"], short_tmp)
    assert ran.returncode == 0, ran.stderr
    assert f"fingerprint (private, as the dataset is): {made.fingerprint}" in ran.stdout
    assert len(EncodedDataset.open(tmp_path / "out").manifest.parts) == 8
    assert private_files(short_tmp) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("encode", "assemble"), [(2, 2), (99, 0), (0, 99)])
def test_workers_that_die(
    engine: str, tmp_path: Path, short_tmp: Path, monkeypatch: pytest.MonkeyPatch, encode: int, assemble: int
) -> None:
    log = write_log(tmp_path, 20_000, group=1000)
    ingest([str(log)], SPEC, tmp_path / "local", IngestOptions(parts=4))
    (tmp_path / "killed").mkdir()
    code = (
        "import sys; from pathlib import Path\n"
        "from lazydp.components.ingest.distributed import ingest_on\n"
        "from lazydp.components.ingest.engines import engine_named\n"
        "from support.killing_engine import KillingEngine\n"
        "name, log, spec, folder, encode, assemble = sys.argv[1:]\n"
        "engine = engine_named(name, workers=2)\n"
        "killing = KillingEngine(engine, Path(folder) / 'killed', encode=int(encode), assemble=int(assemble))\n"
        "ingest_on(killing, [log], spec, Path(folder) / 'out', parts=4, piece_rows=3000)\n"
    )
    words = [sys.executable, "-c", code, engine, str(log), SPEC, str(tmp_path), str(encode), str(assemble)]
    path = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"TMPDIR": str(short_tmp), "PYTHONPATH": path}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert len(list((tmp_path / "killed").iterdir())) >= 3
    if encode + assemble < 99:
        assert ran.returncode == 0, ran.stderr
        assert files(tmp_path / "out") == files(tmp_path / "local")
    else:
        assert "UnavailableError" in ran.stderr.splitlines()[-1], ran.stderr
        assert "a worker died too often" in ran.stderr.splitlines()[-1]
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"killed", "local", "log.parquet", "spec.yaml"}
    assert private_files(short_tmp) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_errors_of_tasks_are_one_line(engine: str, tmp_path: Path, short_tmp: Path) -> None:
    log = write_log(tmp_path, 5000, group=1000)
    content = bytearray(log.read_bytes())
    content[3000:3400] = bytes(400)
    log.write_bytes(bytes(content))
    ran = lazydp(arguments_for(tmp_path, engine), short_tmp)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"lazydp: {log} cannot be read as Parquet")
    assert "Traceback" not in ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"log.parquet", "spec.yaml"}
    assert private_files(short_tmp) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda kind: kind.name)
def test_a_killed_command_leaves_nothing(engine: str, tmp_path: Path, short_tmp: Path, kind: signal.Signals) -> None:
    write_log(tmp_path, 400_000, group=4000)
    words = program(arguments_for(tmp_path, engine, "--parts", "64"))
    variables = os.environ | {"TMPDIR": str(short_tmp), "LAZYDP_TEST_MARK": str(tmp_path)}
    process = subprocess.Popen(words, env=variables, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".lazydp-partial.*/.spill/*")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    process.send_signal(kind)
    process.wait()
    assert process.returncode != 0
    deadline = time.monotonic() + 120
    while running_with(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running_with(str(tmp_path)) == []
    if kind is signal.SIGKILL:
        # The next one removes what is left, as of the local engine.
        write_log(tmp_path, 100, group=100)
        assert lazydp(arguments_for(tmp_path, engine), short_tmp).returncode == 0
        shutil.rmtree(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"log.parquet", "spec.yaml"}
    assert private_files(short_tmp) == []


def running_with(mark: str) -> list[Any]:
    """Processes that inherited the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"LAZYDP_TEST_MARK={mark}".encode() in (process / "environ").read_bytes():
                found.append((process.name, (process / "cmdline").read_bytes()))
        except OSError:
            continue
    return found


def test_engines_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = write_log(tmp_path, 10, group=10)
    for name, module in ENGINES.items():
        monkeypatch.setitem(sys.modules, module, None)
        running = engine_named(name)  # type: ignore[arg-type]
        assert running is not None
        with pytest.raises(InputError, match=rf"pip install 'lazydp\[{name}\]'"):
            ingest_on(running, [str(log)], SPEC, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_spark_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    running = engine_named("spark")
    assert running is not None
    for variable, folder in (("PATH", str(tmp_path)), ("JAVA_HOME", str(tmp_path))):
        monkeypatch.setenv(variable, folder)
        with pytest.raises(InputError, match="Spark needs Java 17 or newer") as caught:
            running.check()
        assert (str(tmp_path) in str(caught.value)) == (variable == "JAVA_HOME")


def test_options_of_engines() -> None:
    assert engine_named("local") is None
    with pytest.raises(InputError, match="--cluster is for --engine ray or spark"):
        engine_named("local", cluster="auto")
    with pytest.raises(InputError, match="--workers is for workers of this machine"):
        engine_named("ray", cluster="auto", workers=2)


@pytest.mark.slow
@needs_ray
def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    log = write_log(tmp_path, 10, group=10)
    with pytest.raises(UnavailableError, match=r"the Ray cluster 127\.0\.0\.1:1 does not answer"):
        ingest_on(RayEngine("127.0.0.1:1", 1), [str(log)], SPEC, tmp_path / "out")
    assert not (tmp_path / "out").exists()
