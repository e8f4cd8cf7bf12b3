"""Jobs of ingest on Spark: on this machine, or on a cluster by its master's URL.

Spark has no unsigned integers of 64 bits and no dictionaries. Rows pass through it as bytes, which it need not read.
It writes what it groups to files. Tasks that failed run again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lazydp.components.ingest.job import ATTEMPTS, PAYLOADS, Job, error_of_task, gave_up, group, is_installed, keyed
from lazydp.components.ingest.locations import one_line
from lazydp.components.ingest.surroundings import environment, same_signals
from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.components.shared.files import scratch_directory

_PIECES = "piece binary"
_MOVED = f"{PAYLOADS.names[0]} int, {PAYLOADS.names[1]} binary"
_RESULTS = "result binary"
_JAVA = "Spark needs Java 17 or newer, and there is no program java: install one (on Debian default-jre-headless)"
_SETTINGS = {
    "spark.log.level": "OFF",
    "spark.ui.showConsoleProgress": "false",
    # A task a part, as the job says; the payloads of one may take more than 2 GiB.
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.execution.arrow.useLargeVarTypes": "true",
    # Payloads have some MB each.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "16",
}


@dataclass(frozen=True)
class SparkEngine:
    """See `job.Engine`.

    cluster: URL of a master, such as `spark://host:7077` or `yarn`; None: a Spark of one's own, on this machine.
    workers: tasks at once of a Spark of one's own.
    """

    cluster: str | None
    workers: int
    name: str = "spark"

    def check(self) -> None:
        """See `job.Engine.check`."""
        if not is_installed("pyspark"):
            raise InputError("--engine spark needs the package pyspark: pip install 'lazydp[spark]'")
        home = os.environ.get("JAVA_HOME")
        if shutil.which("java", path=f"{home}/bin" if home else None) is None:
            raise InputError(f"{_JAVA}{f'; JAVA_HOME is {home}' if home else ''}")

    def run(self, job: Job) -> list[bytes]:
        """See `job.Engine.run`."""
        from py4j.protocol import Py4JError  # noqa: PLC0415 - an extra
        from pyspark.errors import PySparkException  # noqa: PLC0415

        with _session(self.cluster, self.workers) as session:
            try:
                return _run(session, job)
            except (Py4JError, PySparkException) as error:
                told = error_of_task(error)
                raise told or gave_up("Spark", error) from None


@contextlib.contextmanager
def _session(cluster: str | None, workers: int) -> Iterator[Any]:
    """A session of Spark, which ends with the block; the files of one's own are deleted.

    Raises:
        InputError: this process has a session already.
        UnavailableError: Spark does not start, or the cluster does not answer.
    """
    from pyspark.sql import SparkSession  # noqa: PLC0415 - an extra

    if SparkSession.getActiveSession() is not None:
        raise InputError("this process has a session of Spark already: stop it first")
    with contextlib.ExitStack() as stack:
        builder = SparkSession.builder.appName("lazydp ingest").master(cluster or f"local[{workers},{ATTEMPTS}]")
        settings = dict(_SETTINGS)
        if cluster is None:
            folder = str(stack.enter_context(scratch_directory("spark")))
            settings |= _settings_of_own(folder)
            stack.enter_context(environment({"SPARK_LOCAL_DIRS": folder, "PYSPARK_PYTHON": sys.executable}))
        for name, value in settings.items():
            builder = builder.config(name, value)
        stack.enter_context(same_signals())
        stack.callback(_stop)
        try:
            session = builder.getOrCreate()
        except Exception as error:
            where = f"the Spark cluster {cluster} does not answer" if cluster is not None else "Spark does not start"
            raise UnavailableError(f"{where}: {one_line(error)}") from None
        yield session


def _settings_of_own(folder: str) -> dict[str, str]:
    """Settings of a Spark on this machine: nobody else can connect to it, and its files are encrypted."""
    return {
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.authenticate": "true",
        "spark.authenticate.secret": secrets.token_hex(32),
        "spark.network.crypto.enabled": "true",
        "spark.io.encryption.enabled": "true",
        "spark.local.dir": folder,
        "spark.driver.extraJavaOptions": f"-Djava.io.tmpdir={folder}",
    }


def _stop() -> None:
    """End Spark and its virtual machine, which would else go on as long as this process."""
    from pyspark import SparkContext  # noqa: PLC0415 - an extra
    from pyspark.sql import SparkSession  # noqa: PLC0415

    session, gateway = SparkSession.getActiveSession(), SparkContext._gateway
    if session is not None:
        session.stop()
    if gateway is not None:
        gateway.shutdown()
        # The virtual machine ends when nobody can write to it any more.
        gateway.proc.stdin.close()
        gateway.proc.wait()
        SparkContext._gateway = SparkContext._jvm = None


def _run(session: Any, job: Job) -> list[bytes]:
    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for piece in batch.column(0).to_pylist():
                for key, payload in job.encode(piece):
                    yield keyed(key, payload)

    def assemble(found: pa.Table) -> pa.Table:
        key, payloads = group(found)
        return pa.table({"result": pa.array([job.assemble(key, payloads)], pa.large_binary())})

    session.conf.set("spark.sql.shuffle.partitions", str(job.num_keys))
    context = session.sparkContext
    pieces = session.createDataFrame(context.parallelize([(piece,) for piece in job.pieces], len(job.pieces)), _PIECES)
    moved = pieces.mapInArrow(encode, _MOVED)
    made = moved.groupBy(PAYLOADS.names[0]).applyInArrow(assemble, _RESULTS)
    return [bytes(row.result) for row in made.collect()]
