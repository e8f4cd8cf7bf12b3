"""The steps of the pipeline as functions: what the commands of the same names do, with their options as arguments.

    dataset   = ingest(input="interactions.parquet", spec="spec.yaml", out="dataset")
    run       = train(dataset="dataset", config="train.yaml", out="run")
    bundle    = export(run="run", dataset="dataset", out="bundle")
    figures   = evaluate(bundle="bundle", dataset="dataset")

A path is a string or a `pathlib.Path`. Mistakes of the caller raise a `LazyDPError` of
`lazydp.components.shared.errors`, whose message is the line that the command prints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lazydp.components.bundle.reader import Bundle
from lazydp.components.evaluate.evaluate import Evaluation
from lazydp.components.evaluate.evaluate import evaluate as evaluate_bundle
from lazydp.components.export.export import export as export_run
from lazydp.components.export.publish import Snapshots, point
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.distributed import ingest_by
from lazydp.components.ingest.engines import EngineName, engine_named
from lazydp.components.ingest.ingest import DEFAULT_MEMORY_BYTES, IngestOptions
from lazydp.components.ingest.readers import Format
from lazydp.components.ingest.workers import cores
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.train import TrainedRun
from lazydp.components.train.run.train import train as train_run
from lazydp.components.tune.sweep import Sweep
from lazydp.components.tune.tune import Tuned
from lazydp.components.tune.tune import tune as tune_runs
from lazydp.kernels.noise_key import NoiseKey

AnyPath = str | os.PathLike[str]


def ingest(
    *,
    input: AnyPath | Sequence[AnyPath],
    spec: AnyPath,
    out: AnyPath,
    users: AnyPath | None = None,
    items: AnyPath | None = None,
    memory: int = DEFAULT_MEMORY_BYTES,
    format: Format = "auto",
    max_rejected: float = 0.5,
    workers: int | None = None,
    parts: int | None = None,
    keep_rows: bool = False,
    append: AnyPath | None = None,
    replace: bool = False,
    engine: EngineName = "local",
    cluster: str | None = None,
) -> EncodedDataset:
    """Encode interactions (Parquet, CSV, TSV, JSON lines, Delta) into a dataset for training, as `lazydp ingest` does.

    Args:
        input: a file, folder, pattern or Delta table, by path or URI, or several.
        spec: the feature spec: a YAML file, a URI, or YAML text.
        out: the dataset folder to make; private; it appears when it is whole.
        users: the users table, instead of the one that the spec names.
        items: the items table, instead of the one that the spec names.
        memory: bytes to work in, roughly; the rest is on disk.
        format: of the input: `auto`, by content and extension; `parquet`, `csv`, `tsv`, `jsonl` or `criteo`.
        max_rejected: share of rows that may have no usable user, item, time, label or split before it is an error.
        workers: cores to work on; all where None. The dataset is the same.
        parts: sets of files to write, a power of two: where None 1, on an engine by the number of rows. The dataset
            has the same fingerprint.
        keep_rows: keep the encoded rows in the dataset, for `append`.
        append: a dataset that keeps its rows, to which the new ones are added.
        replace: replace the dataset where it exists.
        engine: what does the work: `local`, this process; `ray` or `spark`, their workers.
        cluster: the address of a running cluster of the engine; workers of this machine where None.

    Returns:
        The dataset; `manifest` has its counts, its contribution bound, and why rows were left out.

    Raises:
        InputError: the input or the spec is wrong, or no row was accepted.
        UnavailableError: a store does not answer.
    """
    inputs = [input] if isinstance(input, str | os.PathLike) else input
    options = IngestOptions(
        users=_text(users),
        items=_text(items),
        memory_bytes=memory,
        format=format,
        max_rejected=max_rejected,
        workers=workers if workers is not None else cores(),
        keep_rows=keep_rows,
        append=None if append is None else Path(append),
        replace=replace,
    )
    running = engine_named(engine, cluster=cluster, workers=workers)
    ingest_by(running, [os.fspath(one) for one in inputs], os.fspath(spec), Path(out), options, parts=parts)
    return EncodedDataset.open(Path(out))


def train(
    *,
    dataset: AnyPath,
    config: AnyPath | Mapping[str, Any],
    out: AnyPath,
    ledger: str | None = None,
    mode: Literal["lazydp", "dpsgd", "sgd"] | None = None,
    device: str | None = None,
    table_device: str | None = None,
    tune: AnyPath | None = None,
    publish_every: int | None = None,
    publish_to: AnyPath | None = None,
    name: str | None = None,
    sign_key: AnyPath | None = None,
    resume: bool = False,
    test_key: int | None = None,
) -> TrainedRun | Tuned:
    """Train a recommender with differential privacy, as `lazydp train` does.

    The budget is reserved in the ledger before the first step. A run that was interrupted goes on with `resume`, to the
    same bits.

    Args:
        dataset: what `ingest` wrote.
        config: the training configuration: a YAML file, or the same as a mapping.
        out: the run's folder, private (mode 0700): checkpoints and the noise key.
        ledger: URL of the ledger; None for LAZYDP_LEDGER, or a SQLite file in the working folder.
        mode: instead of the configuration's: `lazydp`; `dpsgd`, noise on every row at every step; `sgd`, no privacy.
        device: instead of the configuration's: `cpu`, `cuda` or `cuda:N`.
        table_device: instead of the configuration's: `cpu` keeps the tables in host memory beside a GPU.
        tune: a sweep, YAML: try settings and leave the best run in `out/best`; charged as a whole.
        publish_every: release a snapshot every so many steps.
        publish_to: folder of the snapshots; given exactly where snapshots are released.
        name: of the snapshots in the service; the feature spec's where None.
        sign_key: file of the Ed25519 private key, PEM, to sign the snapshots with.
        resume: go on with the run (or sweep) in `out`, if there is one.
        test_key: a known noise key, for tests; the model is not private.

    Returns:
        The run, or what the sweep found; `folder` is what `export` takes.

    Raises:
        InputError: `out` holds another run, or the configuration is wrong or does not fit the dataset.
        PrivacyError: the dataset has no budget, or one that does not admit the run (`BudgetExceededError`).
        UnavailableError: the configuration asks for a GPU, and there is none.
    """
    if name is not None and publish_to is None:
        raise InputError("name is that of the snapshots: say where they go with publish_to")
    if tune is not None and publish_to is not None:
        raise InputError("a sweep releases nothing while it runs: leave out publish_to")
    settings = _settings(config, mode=mode, device=device, table_device=table_device, publish_every=publish_every)
    if tune is not None:
        return tune_runs(
            dataset=Path(dataset),
            config=settings,
            sweep=Sweep.load(Path(tune)),
            out=Path(out),
            ledger=ledger,
            resume=resume,
            test_key=test_key,
        )
    publish = None
    if publish_to is not None:
        publish = Snapshots(Path(publish_to), ledger, name, None if sign_key is None else Path(sign_key)).release
    return train_run(
        dataset=Path(dataset),
        config=settings,
        out=Path(out),
        ledger=ledger,
        resume=resume,
        key=NoiseKey.for_tests(test_key) if test_key is not None else None,
        publish=publish,
    )


def export(
    *,
    run: AnyPath,
    dataset: AnyPath,
    out: AnyPath,
    name: str | None = None,
    ledger: str | None = None,
    audit: AnyPath | None = None,
    link: AnyPath | None = None,
    allow_non_private: bool = False,
    sign_key: AnyPath | None = None,
) -> Bundle:
    """Release a finished run, as `lazydp export` does: flush, prove it, commit the budget, destroy the noise key.

    Afterwards the run can neither be resumed nor exported again. Interrupted at any moment, the same call finishes.

    Args:
        run: the run's folder.
        dataset: the dataset it was trained on.
        out: where the bundle goes; must not exist.
        name: of the model in the service; the feature spec's where None.
        ledger: URL of the ledger that holds the run's reservation.
        audit: report of an audit of the run's configuration, for the privacy statement.
        link: a symbolic link to point at the bundle: what `lazydp serve` watches.
        allow_non_private: release a run of mode `sgd` too, marked as not private.
        sign_key: file of the Ed25519 private key, PEM, to sign the bundle with.

    Returns:
        The bundle; `statement` says what privacy it spent.

    Raises:
        InputError: the run is not finished, was exported already, or is of another dataset; or `out` exists.
        PrivacyError: a guarantee does not hold: a row with pending noise, a weight that is not finite, an audit that
            contradicts the claim, a run without privacy.
    """
    export_run(
        run=Path(run),
        dataset=Path(dataset),
        out=Path(out),
        name=name,
        ledger=ledger,
        audit=None if audit is None else Path(audit),
        allow_non_private=allow_non_private,
        sign_key=None if sign_key is None else Path(sign_key),
    )
    if link is not None:
        point(Path(link), Path(out))
    return Bundle.open(Path(out), verify=False, allow_test_key=True, allow_non_private=allow_non_private)


def evaluate(
    *, bundle: AnyPath, dataset: AnyPath, candidates: AnyPath | None = None, out: AnyPath | None = None
) -> Evaluation:
    """Measure a bundle on the held-out examples beside popularity, as `lazydp evaluate` does.

    The figures are computed from private data without noise: they are for internal use.

    Args:
        bundle: what `export` wrote.
        dataset: what `ingest` wrote.
        candidates: a file of what each user's held-out items are ranked among, for papers that do so; None for the
            whole catalogue.
        out: also write the figures as JSON to this file (mode 0600).

    Returns:
        AUC, HR@10, NDCG@10 and Recall@20 of the model and of popularity.

    Raises:
        InputError: they do not belong together, or nothing was held out.
    """
    found = evaluate_bundle(
        bundle=Path(bundle), dataset=Path(dataset), candidates=None if candidates is None else Path(candidates)
    )
    if out is not None:
        found.save(Path(out))
    return found


def _settings(config: AnyPath | Mapping[str, Any], **changes: Any) -> TrainConfig:
    """The configuration, with what the caller gave instead of parts of it."""
    if isinstance(config, Mapping):
        settings = TrainConfig.parse(dict(config), where="config")
    else:
        settings = TrainConfig.load(Path(config))
    given = {name: value for name, value in changes.items() if value is not None}
    return settings.with_changes(**given) if given else settings


def _text(path: AnyPath | None) -> str | None:
    return None if path is None else os.fspath(path)
