"""The two functions of an ingest that an engine runs: a piece of the input to encoded rows, and a part to its files.

Payloads are a letter, which says what follows, and an Arrow stream of rows or a tally in JSON. Tallies travel with the
rows, under a key of their own: so each piece is counted once, however often its task ran.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Literal

import pyarrow as pa

from lazydp.components.ingest.assemble import Assembler
from lazydp.components.ingest.ingest import IngestOptions, workspace_for
from lazydp.components.ingest.job import Keyed, told_errors
from lazydp.components.ingest.kept import part_name, rows_of_ranges
from lazydp.components.ingest.manifest import FileEntry
from lazydp.components.ingest.part_sink import PartSink
from lazydp.components.ingest.ranges import Range, ranges_of
from lazydp.components.ingest.readers import Reader
from lazydp.components.ingest.resolve import ResolvedSpec
from lazydp.components.ingest.rows import InteractionEncoder, Tally
from lazydp.components.ingest.source import RowSource
from lazydp.components.ingest.spill import part_by_hash, part_encoded
from lazydp.components.ingest.user_rows import encode_users, sums_of_users, user_columns
from lazydp.components.ingest.writer import PartWriter, file_entry
from lazydp.components.shared.errors import InputError

Kind = Literal["interactions", "users"]
_ROWS: dict[Kind, bytes] = {"interactions": b"i", "users": b"u"}
_TALLY = b"t"
# What a task holds before it hands rows on; one of a Parquet file has no more than its row groups.
_HELD_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Some files, or row groups of one, of the interactions or of the users table."""

    kind: Kind
    files: tuple[Reader, ...]

    def pickled(self) -> bytes:
        """The piece as an engine sends it."""
        return pickle.dumps(self)


@dataclass
class Counted:
    """What tasks counted: of each kind of rows, those read, and those handed on to each part."""

    tallies: dict[Kind, Tally] = field(default_factory=lambda: {"interactions": Tally(), "users": Tally()})
    moved: dict[Kind, Counter[int]] = field(default_factory=lambda: {"interactions": Counter(), "users": Counter()})

    def dumped(self) -> bytes:
        """As JSON."""
        tallies = {
            kind: {
                "num_rows": tally.num_rows,
                "rejected": tally.rejected,
                "sums": tally.sums,
                "moved": self.moved[kind],
            }
            for kind, tally in self.tallies.items()
        }
        return json.dumps({"tallies": tallies}).encode()

    @staticmethod
    def is_dumped(dumped: bytes) -> bool:
        """Whether `dumped` made it, and not `Made.dumped`."""
        return "tallies" in json.loads(dumped)

    def add(self, dumped: bytes) -> None:
        """Take in what another task counted."""
        found = json.loads(dumped)
        for kind, tally in self.tallies.items():
            one = found["tallies"][kind]
            tally.rejected += Counter(one["rejected"])
            tally.add_counts(one["num_rows"], tuple(one["sums"]))
            self.moved[kind] += Counter({int(part): count for part, count in one["moved"].items()})


@dataclass(frozen=True)
class Made:
    """A part that is in its place.

    users: rows of the users table that fell into it.
    ranges, files: empty where no interaction did; then nothing was written.
    """

    part: int
    users: int
    ranges: list[Range]
    files: dict[str, FileEntry]

    @property
    def rows(self) -> int:
        """Its accepted rows."""
        return sum(found.rows for found in self.ranges)

    def dumped(self) -> bytes:
        """As JSON."""
        files = {name: entry.model_dump() for name, entry in self.files.items()}
        ranges = [asdict(found) for found in self.ranges]
        return json.dumps({"part": self.part, "users": self.users, "ranges": ranges, "files": files}).encode()

    @classmethod
    def loaded(cls, dumped: bytes) -> Made:
        """What `dumped` made."""
        found = json.loads(dumped)
        files = {name: FileEntry(**entry) for name, entry in found["files"].items()}
        return cls(found["part"], found["users"], [Range(**one) for one in found["ranges"]], files)


@dataclass(frozen=True)
class Encode:
    """Encodes a piece and parts its rows: a job's `encode`.

    where: the input, for messages.
    """

    resolved: ResolvedSpec
    encoder: InteractionEncoder
    sink: PartSink
    parts: int
    most_rows: int
    where: str
    lazydp_version: str = field(default_factory=lambda: version("lazydp"))

    def __call__(self, pickled: bytes) -> Iterator[Keyed]:
        """(part, rows) of the piece, and what was counted in it under the key after all parts.

        Raises:
            TaskError: the input is wrong, has changed, or another lazydp is installed here.
        """
        with told_errors():
            self._check_version()
            self.sink.check()
            piece: Piece = pickle.loads(pickled)  # noqa: S301 - made by `Piece.pickled`, sent by the engine
            yield from self._encoded(piece)

    def _check_version(self) -> None:
        if version("lazydp") != self.lazydp_version:
            raise InputError(
                f"a worker has lazydp {version('lazydp')}, and this is {self.lazydp_version}: install the same on all"
            )

    def _encoded(self, piece: Piece) -> Iterator[Keyed]:
        for file in piece.files:
            file.check_unchanged()
        counted = Counted()
        held = _Held(_ROWS[piece.kind])
        source = RowSource(piece.files, self.where)
        read = self._interactions if piece.kind == "interactions" else self._users
        for part, rows in read(source, counted):
            held.add(part, rows)
            counted.moved[piece.kind][part] += rows.num_rows
            if held.num_bytes > _HELD_BYTES:
                yield from held.taken()
        yield from held.taken()
        for file in piece.files:
            file.check_unchanged()
        yield self.parts, pa.py_buffer(_TALLY + counted.dumped())

    def _interactions(self, source: RowSource, counted: Counted) -> Iterator[tuple[int, pa.RecordBatch]]:
        for batch in source.batches(self.encoder.columns, most_rows=self.most_rows, coded=True):
            encoded = self.encoder.encode(batch)
            counted.tallies["interactions"].add(encoded)
            if encoded.num_accepted:
                yield from part_encoded(encoded, self.parts).parts()

    def _users(self, source: RowSource, counted: Counted) -> Iterator[tuple[int, pa.RecordBatch]]:
        spec, vocabularies = self.resolved.spec, self.resolved.vocabularies
        for batch in source.batches(user_columns(spec), most_rows=self.most_rows):
            rows, hashes = encode_users(spec, vocabularies, batch)
            yield from part_by_hash(rows, hashes, self.parts).parts()
            counted.tallies["users"].add_counts(rows.num_rows, sums_of_users(rows, hashes))


class _Held:
    """Rows of parts that wait until there are enough to be handed on."""

    def __init__(self, letter: bytes) -> None:
        self._letter = letter
        self._rows: dict[int, list[pa.RecordBatch]] = {}
        self.num_bytes = 0

    def add(self, part: int, rows: pa.RecordBatch) -> None:
        self._rows.setdefault(part, []).append(rows)
        self.num_bytes += rows.nbytes

    def taken(self) -> Iterator[Keyed]:
        """What waits, a payload a part; nothing waits afterwards."""
        rows, self._rows, self.num_bytes = self._rows, {}, 0
        for part in sorted(rows):
            yield part, _payload(self._letter, rows.pop(part))


def _payload(letter: bytes, batches: Sequence[pa.RecordBatch]) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    sink.write(letter)
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


@dataclass(frozen=True)
class Assemble:
    """Assembles a part and puts its files in their place, or adds up what was counted: a job's `assemble`."""

    resolved: ResolvedSpec
    sink: PartSink
    options: IngestOptions

    def __call__(self, key: int, payloads: Sequence[pa.Buffer]) -> bytes:
        """See `Made.dumped`; for the key after all parts `Counted.dumped`.

        Raises:
            TaskError: files cannot be written, or memory does not suffice.
        """
        with told_errors():
            if key == self.options.parts:
                counted = Counted()
                for payload in payloads:
                    counted.add(payload[1:].to_pybytes())
                return counted.dumped()
            rows, users = (_table(payloads, _ROWS[kind]) for kind in ("interactions", "users"))
            return self._made(key, rows, users).dumped()

    def _made(self, part: int, rows: pa.Table | None, users: pa.Table | None) -> Made:
        num_users = users.num_rows if users is not None else 0
        if rows is None:
            return Made(part, num_users, [], {})
        self.sink.check()
        spec = self.resolved.spec
        with self.sink.scratch() as scratch:
            # One task of a worker runs at a time.
            workspace = workspace_for(rows, scratch, replace(self.options, workers=1))
            assembled = Assembler(spec, self.resolved.vocabularies).assemble(rows, users, workspace)
            ranges = ranges_of(assembled)
            kept = rows_of_ranges(spec, rows, assembled, ranges) if self.options.keep_rows else []
            folder = scratch / "part"
            with PartWriter(folder, spec) as writer:
                writer.append(assembled, kept)
                known = writer.finish()
            files = {path.name: known.get(path) or file_entry(path) for path in sorted(folder.iterdir())}
            self.sink.put(folder, part_name(part, self.options.parts))
        return Made(part, num_users, ranges, files)


def _table(payloads: Sequence[pa.Buffer], letter: bytes) -> pa.Table | None:
    """The rows of the payloads that begin with a letter; None without any."""
    batches: list[pa.RecordBatch] = []
    for payload in payloads:
        if payload[:1].to_pybytes() == letter:
            batches += pa.ipc.open_stream(_aligned(payload[1:]))
    return pa.Table.from_batches(batches) if batches else None


def _aligned(payload: pa.Buffer) -> pa.Buffer:
    """A copy that begins where numbers may begin: an engine puts payloads one after the other."""
    sink = pa.BufferOutputStream()
    sink.write(payload)
    return sink.getvalue()
