"""Ingest: an interaction log and a feature spec to an encoded dataset, in bounded memory.

Rows are encoded a batch at a time and parted by a hash of the user into files; then the users of one part at a time are
sorted, bounded, split and written. Only what is public (catalogue, vocabularies) is held in memory whole.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa

from lazydp.components.features.spec import FeatureSpec
from lazydp.components.features.values import MAX_ID
from lazydp.components.ingest.assemble import Assembled, Assembler
from lazydp.components.ingest.kept import KeptRows, part_name, rows_of_ranges, spilled_rows
from lazydp.components.ingest.locations import shown
from lazydp.components.ingest.manifest import DatasetManifest, FileEntry, Kept, Origin
from lazydp.components.ingest.memory import PLENTY, Workspace, allocators_for, working_memory
from lazydp.components.ingest.ranges import NUM_RANGES, RANGE_BITS, Range, ranges_of
from lazydp.components.ingest.readers import BATCH_ROWS, Format
from lazydp.components.ingest.resolve import ResolvedSpec, load_spec, resolve
from lazydp.components.ingest.rows import Encoded, InteractionEncoder, Tally
from lazydp.components.ingest.source import RowSource
from lazydp.components.ingest.spill import (
    Parted,
    Spill,
    part_by_hash,
    part_encoded,
    partitions_needed,
)
from lazydp.components.ingest.stored import dataset_folder
from lazydp.components.ingest.user_rows import encode_users, sums_of_users, user_columns
from lazydp.components.ingest.workers import cores, in_order
from lazydp.components.ingest.writer import PartWriter, finish_dataset
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_DIRECTORY
from lazydp.components.shared.progress import Progress

DEFAULT_MEMORY_BYTES = 1 << 30
# Above this fraction of the rows, a reason to leave rows out is more likely an error of the spec than of the data.
_MUCH = 0.2
_REMEDIES = {
    "null_user": "does user.column name the right column?",
    "long_user": f"ids of users have up to {MAX_ID} characters; does user.column name the right column?",
    "null_item": "does item.column name the right column?",
    "unknown_item": "does the item vocabulary cover the catalogue?",
    "bad_timestamp": "does timestamp name the right column?",
    "bad_label": "labels are numbers from 0 to 1 (kind: column); for ratings say kind: threshold",
    "unknown_split": "does split name the values that the column has?",
}
# An item that the catalogue lacks may be what the spec asks for; rows without a user or a label never are.
_NEVER_MOST = {"null_user", "long_user", "null_item", "bad_timestamp", "bad_label", "unknown_split"}
# Batches of fewer rows cost more than they save. While it is encoded and parted, a row takes about so many bytes: for
# its user, and for each column.
_FEWEST_ROWS = 1 << 13
_ENCODED_ROW_BYTES = 128
_ENCODED_COLUMN_BYTES = 20
# A byte of compressed text is at most about so many of plain text.
_MOST_COMPRESSED = 8
# What a row takes while it is assembled, at most, and for each column.
_ASSEMBLED_ROW_BYTES = 64
_COLUMN_BYTES = 4
SCRATCH = ".spill"
_log = logging.getLogger("lazydp.ingest")


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """What does not change the dataset but how it is made, and where side tables are when not where the spec says.

    memory_bytes: the anonymous memory that the process may take, interpreter and libraries included.
    workers: threads that encode and assemble; all cores by default.
    parts: sets of files to write, by ranges of users' hashes; a power of two up to 512. The fingerprint is the same.
    keep_rows: keep the encoded rows in the dataset, so that later ones can be added.
    append: a dataset that keeps its rows, to which the new ones are added; it says into how many parts.
    format: of the interactions' files; `auto` goes by what each is.
    max_rejected: the share of the rows that may lack a usable user, item, time, label or split; more is an error.
    """

    users: str | None = None
    items: str | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    replace: bool = False
    format: Format = "auto"
    max_rejected: float = 0.5
    workers: int = field(default_factory=cores)
    parts: int = 1
    keep_rows: bool = False
    append: Path | None = None

    def __post_init__(self) -> None:
        """Check the number of parts.

        Raises:
            InputError: it is no power of two from 1 to 512.
        """
        if self.parts not in {1 << power for power in range(RANGE_BITS + 1)}:
            raise InputError(f"parts: expected a power of two from 1 to {NUM_RANGES}, found {self.parts}")


def ingest(inputs: Sequence[str], spec: str, out: str | Path, options: IngestOptions | None = None) -> DatasetManifest:
    """Encode interactions.

    Args:
        inputs: files, folders, patterns or Delta tables, by path or URI.
        spec: the feature spec: a path, a URI, or YAML text.
        out: the folder to make, by path or by URI of a store; it appears when it is whole.
        options: see `IngestOptions`.

    Returns:
        The manifest of the dataset.

    Raises:
        InputError: the input or the spec is wrong, or no row was accepted.
        UnavailableError: a store does not answer.
    """
    options = options or IngestOptions()
    with allocators_for(options.memory_bytes):
        return _ingest(inputs, spec, out, options)


def _ingest(inputs: Sequence[str], spec: str, out: str | Path, options: IngestOptions) -> DatasetManifest:
    before = KeptRows.open(options.append) if options.append is not None else None
    if before is not None:
        options = replace(options, parts=before.kept.parts, keep_rows=True)
    written, base = load_spec(spec)
    source = RowSource.open(inputs, kind=options.format)
    resolved = resolve(written, base=base, users=options.users, items=options.items)
    encoder = InteractionEncoder(resolved.spec, resolved.vocabularies, source)
    locations = tuple(map(shown, inputs))
    if before is not None:
        before.check_same(spec=resolved.spec.document(), time_kind=encoder.time_kind, locations=locations)
        locations = (*before.manifest.source.locations, *locations)
    with dataset_folder(out, replace=options.replace) as folder:
        scratch = folder / SCRATCH
        scratch.mkdir(mode=PRIVATE_DIRECTORY)
        interactions, tally = _spill_interactions(source, encoder, scratch, options)
        users, users_digest = _spill_users(resolved, scratch, interactions.num_partitions)
        if before is not None:
            before.check_users(users_digest)
            tally.rejected += before.rejected
            tally.add_counts(before.manifest.source.rows, before.sums)
        content = _assemble(resolved, interactions, users, before, folder, options)
        scratch.rmdir()
        return finish_dataset(
            folder,
            resolved,
            parts=content.parts,
            ranges=content.ranges,
            files=content.files,
            rejected=tally.rejected,
            origin=Origin(locations=locations, rows=tally.num_rows, digest=tally.digest()),
            kept=Kept(
                parts=options.parts,
                sums=(str(tally.sums[0]), str(tally.sums[1])),
                time_kind=encoder.time_kind,
                users_digest=users_digest,
            )
            if options.keep_rows
            else None,
        )


def _spill_interactions(
    source: RowSource, encoder: InteractionEncoder, scratch: Path, options: IngestOptions
) -> tuple[Spill, Tally]:
    tally = Tally()
    spill: Spill | None = None
    batches = source.batches(encoder.columns, most_rows=_batch_rows(options, len(encoder.columns)), coded=True)
    scarce = options.memory_bytes < PLENTY
    try:
        with Progress("ingest: encode", total=source.num_rows, unit="rows") as progress:
            for batch in batches:
                encoded = encoder.encode(batch)
                tally.add(encoded)
                progress.advance(batch.num_rows)
                if encoded.num_accepted:
                    # Half of the memory is for rows that wait, half for those in work; little goes to the latter alone.
                    free = working_memory(options.memory_bytes)
                    held = 0 if scarce else free // 2
                    number = partitions_needed(
                        num_rows=_rows_at_most(source, batch),
                        row_bytes=part_encoded(encoded, 1).num_bytes / encoded.num_accepted,
                        memory_bytes=free - held,
                        workers=options.workers,
                    )
                    spill = Spill(scratch, "interactions", max(number, options.parts), memory_bytes=held)
                    spill.add(part_encoded(encoded, spill.num_partitions))
                    break
            # The first rows have said how many parts there are; the others are encoded on all cores.
            if spill is not None:
                parted = partial(_encoded_and_parted, encoder, spill.num_partitions)
                for encoded, parts in in_order(parted, batches, workers=options.workers):
                    tally.add(encoded)
                    spill.add(parts)
                    progress.advance(encoded.num_rows)
    finally:
        if spill is not None:
            spill.close()
        # What the reader's library keeps for its next batch is wanted elsewhere now.
        pa.default_memory_pool().release_unused()
    if spill is None:
        raise InputError(f"no row of {source.where} can be used: {reasons(tally.num_rows, tally.rejected)}")
    judge_loss(tally.num_rows, tally.rejected, most=options.max_rejected)
    return spill, tally


def _encoded_and_parted(
    encoder: InteractionEncoder, num_partitions: int, batch: pa.RecordBatch
) -> tuple[Encoded, Parted]:
    encoded = encoder.encode(batch)
    return encoded, part_encoded(encoded, num_partitions)


def _batch_rows(options: IngestOptions, num_columns: int) -> int:
    """Rows of a batch, so that those which the workers encode at once fit the memory given."""
    at_once = working_memory(options.memory_bytes) // (2 * (options.workers + 2))
    row_bytes = _ENCODED_ROW_BYTES + _ENCODED_COLUMN_BYTES * num_columns
    return max(_FEWEST_ROWS, min(BATCH_ROWS, at_once // row_bytes))


def _rows_at_most(source: RowSource, first: pa.RecordBatch) -> int:
    """Rows of the source; for text, which has to be read to know, an estimate that is rather too high.

    Of text only some columns are read, so that a row has more bytes in the file than in `first`.
    """
    if source.num_rows is not None:
        return source.num_rows
    return int(source.num_bytes * _MOST_COMPRESSED / (max(first.nbytes, 1) / first.num_rows))


def reasons(num_rows: int, rejected: Counter[str]) -> str:
    """Why so many rows were left out, for a message."""
    if num_rows == 0:
        return "it has no rows"
    return ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())


def judge_loss(num_rows: int, rejected: Counter[str], *, most: float) -> None:
    """Say so where a reason that the spec didn't ask for took a good part of the rows, stop where it took most.

    Raises:
        InputError: more than the share `most` of the rows has no usable user, item, time, label or split.
    """
    for reason, count in rejected.most_common():
        if reason in _REMEDIES and count > _MUCH * num_rows:
            told = f"{count} of {num_rows} rows were left out ({reason}): {_REMEDIES[reason]}"
            if reason in _NEVER_MOST and count > most * num_rows:
                raise InputError(f"{told}; --max-rejected admits it")
            _log.warning("%s", told)


def _spill_users(resolved: ResolvedSpec, scratch: Path, num_partitions: int) -> tuple[Spill | None, str]:
    """The encoded user features, parted as the interactions are, and their digest; None and "" where there are none."""
    columns, source = user_columns(resolved.spec), resolved.users
    if source is None or not columns:
        return None, ""
    tally = Tally()
    spill = Spill(scratch, "users", num_partitions)
    try:
        for batch in source.batches(columns):
            rows, hashes = encode_users(resolved.spec, resolved.vocabularies, batch)
            spill.add(part_by_hash(rows, hashes, num_partitions))
            tally.add_counts(rows.num_rows, sums_of_users(rows, hashes))
    finally:
        spill.close()
    return spill, tally.digest()


@dataclass
class _Written:
    """What the parts hold."""

    parts: list[str] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)
    files: dict[Path, FileEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class _Done:
    """A partition that is assembled, and what is kept of its rows."""

    part: Assembled
    ranges: list[Range]
    rows: list[pa.RecordBatch]


def _assemble(
    resolved: ResolvedSpec,
    interactions: Spill,
    users: Spill | None,
    before: KeptRows | None,
    folder: Path,
    options: IngestOptions,
) -> _Written:
    assembler = Assembler(resolved.spec, resolved.vocabularies)
    number = interactions.num_partitions
    per_part = number // options.parts
    has_rows = [interactions.has_rows(place) for place in range(number)]
    touched = [any(has_rows[place * per_part : (place + 1) * per_part]) for place in range(options.parts)]

    def assembled(place: int) -> _Done | None:
        tables = [table for table in (interactions.read(place),) if table is not None]
        profiles = users.read(place) if users is not None else None
        if before is not None and touched[place // per_part]:
            tables += [spilled_rows(resolved.spec, table) for table in before.rows(place, number)]
        if not tables:
            return None
        rows = tables[0] if len(tables) == 1 else _one_table(tables)
        part = assembler.assemble(rows, profiles, workspace_for(rows, folder / SCRATCH, options))
        ranges = ranges_of(part)
        return _Done(part, ranges, rows_of_ranges(resolved.spec, rows, part, ranges) if options.keep_rows else [])

    written = _Written()
    with Progress("ingest: assemble", total=number, unit="parts") as progress:
        results = in_order(assembled, range(number), workers=options.workers)
        for place in range(options.parts):
            name = part_name(place, options.parts)
            found = islice(results, per_part)
            if before is not None and not touched[place]:
                # Nothing of it has changed: the files are those that it had.
                progress.advance(len(list(found)))
                if before.ranges(place):
                    before.link(place, folder)
                    written.parts.append(name)
                    written.ranges += before.ranges(place)
            elif _write_part(folder / name, resolved.spec, found, written, progress):
                written.parts.append(name)
    return written


def workspace_for(rows: pa.Table, scratch: Path, options: IngestOptions) -> Workspace:
    """Memory, or files where one partition needs more of it than a worker may take: a user's rows stay together."""
    needed = rows.num_rows * (_ASSEMBLED_ROW_BYTES + 2 * _COLUMN_BYTES * rows.num_columns)
    fits = needed <= working_memory(options.memory_bytes) // (options.workers + 1)
    return Workspace(None if fits else scratch)


def _one_table(tables: Sequence[pa.Table]) -> pa.Table:
    """Old rows and new ones together.

    Raises:
        InputError: times have fractions in one of them alone.
    """
    if any(table.schema != tables[0].schema for table in tables):
        raise InputError("the times of the old rows or of the new ones alone have fractions: ingest the whole log")
    return pa.concat_tables(tables)


def _write_part(
    folder: Path, spec: FeatureSpec, results: Iterable[_Done | None], written: _Written, progress: Progress
) -> bool:
    """Write the files of one part; False where it holds no row."""
    with ExitStack() as stack:
        writer: PartWriter | None = None
        for done in results:
            progress.advance()
            if done is None:
                continue
            writer = writer or stack.enter_context(PartWriter(folder, spec))
            writer.append(done.part, done.rows)
            written.ranges += done.ranges
        if writer is not None:
            written.files |= writer.finish()
    return writer is not None
