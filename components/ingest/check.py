"""A dry run of ingest: what is found, how it is read, and what would be left out; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lazydp.components.features.catalogue import ID_COLUMN, TITLE_COLUMN, catalogue_table
from lazydp.components.ingest.ingest import IngestOptions
from lazydp.components.ingest.resolve import load_spec, resolve
from lazydp.components.ingest.rows import InteractionEncoder, Tally
from lazydp.components.ingest.source import RowSource
from lazydp.components.ingest.workers import in_order
from lazydp.components.shared.progress import Progress

_SHOWN = 5


def check(inputs: Sequence[str], spec: str, options: IngestOptions | None = None) -> Iterator[str]:
    """Lines that say what ingest would do with the input; arguments as of `ingest`.

    Of private rows only counts are told, and they are private; rows are shown of the public catalogue alone.

    Raises:
        InputError: what ingest would refuse.
        UnavailableError: a store does not answer.
    """
    options = options or IngestOptions()
    written, base = load_spec(spec)
    source = RowSource.open(inputs, kind=options.format)
    resolved = resolve(written, base=base, users=options.users, items=options.items)
    encoder = InteractionEncoder(resolved.spec, resolved.vocabularies, source)
    yield f"{len(source.files)} file(s), {source.num_bytes:,} bytes: {source.where}"
    for column in source.column_names:
        used = "" if column in encoder.columns else "    (not used)"
        yield f"  column {column}: {', '.join(str(kind) for kind in source.types(column))}{used}"
    if resolved.spec.item is not None:
        table = catalogue_table(resolved.spec, resolved.vocabularies, resolved.items)
        yield f"catalogue: {table.num_rows:,} items, the first of them:"
        for row in table.select([ID_COLUMN, TITLE_COLUMN]).slice(0, _SHOWN).to_pylist():
            title = "" if row[TITLE_COLUMN] is None else f": {row[TITLE_COLUMN]}"
            yield " ".join(f"  {row[ID_COLUMN]}{title}".splitlines())
    tally = Tally()
    with Progress("ingest: check", total=source.num_rows, unit="rows") as progress:
        for encoded in in_order(encoder.encode, source.batches(encoder.columns), workers=options.workers):
            tally.add(encoded)
            progress.advance(encoded.num_rows)
    left_out = sum(tally.rejected.values())
    yield f"private: {tally.num_rows:,} rows, of which {tally.num_rows - left_out:,} can be used"
    for reason, count in tally.rejected.most_common():
        yield f"  left out: {count:,} rows, {reason}"
    yield "nothing was written"
