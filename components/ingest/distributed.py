"""Ingest on an engine: as `ingest`, with the work done by an engine's workers on this machine or on others.

The input is cut into pieces, whose rows are encoded and parted by the users' hashes. Each part is assembled by one
task, which writes the files of the part. The functions that do it are those of the local engine, and so the dataset
is the same.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lazydp.components.ingest.ingest import SCRATCH, IngestOptions, ingest, judge_loss, reasons
from lazydp.components.ingest.job import Engine, Job
from lazydp.components.ingest.kept import part_name
from lazydp.components.ingest.locations import is_uri, shown
from lazydp.components.ingest.manifest import DatasetManifest, FileEntry, Kept, Origin
from lazydp.components.ingest.part_sink import PartSink, SharedFolder, StoredFolder
from lazydp.components.ingest.readers import BATCH_ROWS, Reader
from lazydp.components.ingest.resolve import ResolvedSpec, load_spec, resolve
from lazydp.components.ingest.rows import InteractionEncoder
from lazydp.components.ingest.source import RowSource
from lazydp.components.ingest.spill import partitions_needed
from lazydp.components.ingest.stored import dataset_folder, dataset_of_parts
from lazydp.components.ingest.tasks import Assemble, Counted, Encode, Kind, Made, Piece
from lazydp.components.ingest.user_rows import user_columns
from lazydp.components.ingest.writer import finish_dataset
from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.components.shared.files import PRIVATE_DIRECTORY

_PIECE_ROWS = 1 << 20
_PIECE_BYTES = 64 << 20
# A row of text has seldom fewer bytes; an encoded row takes about so many while it is moved.
_TEXT_ROW_BYTES = 16
_MOVED_ROW_BYTES = 64
_ENDED = ".ended"
_log = logging.getLogger("lazydp.ingest")


def ingest_on(
    engine: Engine,
    inputs: Sequence[str],
    spec: str,
    out: str | Path,
    options: IngestOptions | None = None,
    *,
    parts: int | None = None,
    piece_rows: int = _PIECE_ROWS,
) -> DatasetManifest:
    """Encode interactions on an engine; the dataset has the fingerprint that `ingest` gives it.

    Args:
        engine: runs the tasks.
        inputs: as of `ingest`; all workers have to reach them.
        spec: as of `ingest`.
        out: a folder that all machines share, or a URI of a store.
        options: as of `ingest`; `memory_bytes` is for one task, and `workers` and `parts` do not count.
        parts: sets of files to write, each made by one task; by the number of rows where None.
        piece_rows: rows that a task reads, about; a file of text is read by one task.

    Returns:
        The manifest of the dataset.

    Raises:
        InputError: the input, the spec or an option is wrong, or no row was accepted.
        UnavailableError: a store or the engine's cluster does not answer, or workers ended too often.
    """
    options = options or IngestOptions()
    if options.append is not None:
        raise InputError(f"--append is for the engine local alone: add the rows without --engine {engine.name}")
    engine.check()
    written, base = load_spec(spec)
    source = RowSource.open(inputs, kind=options.format)
    resolved = resolve(written, base=base, users=options.users, items=options.items)
    encoder = InteractionEncoder(resolved.spec, resolved.vocabularies, source)
    pieces = [*_pieces("interactions", source, piece_rows)]
    if resolved.users is not None and user_columns(resolved.spec):
        pieces += _pieces("users", resolved.users, piece_rows)
    options = replace(options, parts=parts or _parts_needed(source, options))
    sent = replace(resolved, users=None, items=None)
    with _unfinished(out, replace=options.replace) as (folder, sink):
        encode = Encode(sent, encoder, sink, options.parts, min(piece_rows, BATCH_ROWS), source.where)
        assemble = Assemble(sent, sink, options)
        _log.info("%s: %d pieces of the input, %d parts to be made", engine.name, len(pieces), options.parts)
        job = Job([piece.pickled() for piece in pieces], encode, assemble, options.parts + 1)
        counted, made = _results(engine.run(job) if pieces else [])
        _check_counts(source, counted, made, options)
        made = [one for one in made if one.ranges]
        return _finished(folder, resolved, encoder, made, counted, inputs, options)


def ingest_by(
    engine: Engine | None,
    inputs: Sequence[str],
    spec: str,
    out: str | Path,
    options: IngestOptions,
    *,
    parts: int | None = None,
) -> DatasetManifest:
    """As `ingest` where `engine` is None, else as `ingest_on`."""
    if engine is None:
        return ingest(inputs, spec, out, replace(options, parts=parts or 1))
    return ingest_on(engine, inputs, spec, out, options, parts=parts)


def _pieces(kind: Kind, source: RowSource, most_rows: int) -> Iterator[Piece]:
    """The files cut into pieces, small ones several in a piece."""
    waiting: list[Reader] = []
    rows = size = 0
    for file in (piece for whole in source.files for piece in whole.pieces(most_rows)):
        waiting.append(file)
        rows += file.num_rows or 0
        size += 0 if file.num_rows is not None else file.num_bytes
        if rows >= most_rows or size >= _PIECE_BYTES:
            yield Piece(kind, tuple(waiting))
            waiting, rows, size = [], 0, 0
    if waiting:
        yield Piece(kind, tuple(waiting))


def _parts_needed(source: RowSource, options: IngestOptions) -> int:
    """As many parts as one task each can hold; it depends on the input and on `memory_bytes` alone."""
    num_rows = source.num_rows if source.num_rows is not None else source.num_bytes // _TEXT_ROW_BYTES
    return partitions_needed(num_rows=num_rows, row_bytes=_MOVED_ROW_BYTES, memory_bytes=options.memory_bytes)


@contextmanager
def _unfinished(out: str | Path, *, replace: bool) -> Iterator[tuple[Path, PartSink]]:
    """The folder for what this process writes, and where tasks put parts; both become the dataset when all is well."""
    if is_uri(str(out)):
        with dataset_of_parts(str(out), replace=replace) as (folder, place):
            yield folder, StoredFolder(place)
        return
    with dataset_folder(out, replace=replace) as folder:
        scratch = folder / SCRATCH
        scratch.mkdir(mode=PRIVATE_DIRECTORY)
        try:
            yield folder, SharedFolder(folder, SCRATCH)
        except BaseException:
            # A task that still runs makes no file any more, while all that is here is deleted.
            with suppress(OSError):
                scratch.rename(folder / _ENDED)
            raise


def _results(dumped: Sequence[bytes]) -> tuple[Counted, list[Made]]:
    """What was counted, and the parts in their order."""
    counted = Counted()
    made: list[Made] = []
    for one in dumped:
        if Counted.is_dumped(one):
            counted.add(one)
        else:
            made.append(Made.loaded(one))
    return counted, sorted(made, key=lambda one: one.part)


def _check_counts(source: RowSource, counted: Counted, made: Sequence[Made], options: IngestOptions) -> None:
    """Check that rows could be used, and that each that was handed on came to its part.

    Raises:
        InputError: too few rows could be used.
        UnavailableError: the engine lost rows, or took some twice.
    """
    tally = counted.tallies["interactions"]
    if not counted.moved["interactions"]:
        raise InputError(f"no row of {source.where} can be used: {reasons(tally.num_rows, tally.rejected)}")
    judge_loss(tally.num_rows, tally.rejected, most=options.max_rejected)
    found: dict[Kind, Counter[int]] = {
        "interactions": Counter({one.part: one.rows for one in made}),
        "users": Counter({one.part: one.users for one in made}),
    }
    for kind, moved in counted.moved.items():
        if found[kind] != moved:
            raise UnavailableError(
                f"the engine moved {found[kind].total()} rows ({kind}) of {moved.total()} that were encoded: it lost "
                "rows, or took some twice; run ingest again"
            )


def _finished(
    folder: Path,
    resolved: ResolvedSpec,
    encoder: InteractionEncoder,
    made: Sequence[Made],
    counted: Counted,
    inputs: Sequence[str],
    options: IngestOptions,
) -> DatasetManifest:
    names = [part_name(one.part, options.parts) for one in made]
    files = {
        folder / name / file: entry for name, one in zip(names, made, strict=True) for file, entry in one.files.items()
    }
    if (folder / SCRATCH).exists():
        _check_files(files)
        # Tasks that were killed leave files there.
        shutil.rmtree(folder / SCRATCH)
    tally, users = counted.tallies["interactions"], counted.tallies["users"]
    has_users = resolved.users is not None and bool(user_columns(resolved.spec))
    kept = Kept(
        parts=options.parts,
        sums=(str(tally.sums[0]), str(tally.sums[1])),
        time_kind=encoder.time_kind,
        users_digest=users.digest() if has_users else "",
    )
    return finish_dataset(
        folder,
        resolved,
        parts=names,
        ranges=[found for one in made for found in one.ranges],
        files=files,
        rejected=tally.rejected,
        origin=Origin(locations=tuple(map(shown, inputs)), rows=tally.num_rows, digest=tally.digest()),
        kept=kept if options.keep_rows else None,
    )


def _check_files(files: dict[Path, FileEntry]) -> None:
    """Check that what the workers wrote is here.

    Raises:
        UnavailableError: it is not.
    """
    for path, entry in files.items():
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise UnavailableError(
                f"a worker wrote {path.parent.name}/{path.name}, and it is not in {path.parent} here: name a folder "
                "that all machines share, or a store, such as s3://bucket/folder"
            )
