"""Criteo's tab-separated click logs to one Parquet file: label, i1..i13, c1..c26, split.

python examples/criteo-samples/convert.py ../shared/data/criteo-samples out/criteo.parquet
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

INTEGERS = [f"i{number}" for number in range(1, 14)]
CATEGORIES = [f"c{number}" for number in range(1, 27)]
COLUMNS = ["label", *INTEGERS, *CATEGORIES]
# The published dev rows join the training rows; the test rows stay for evaluation.
FILES = {"train": "train", "dev": "train", "test": "test"}


def convert(source: Path, target: Path) -> int:
    """Read the three files of `source` and write `target`; returns the number of rows."""
    types = {name: pa.int64() for name in ("label", *INTEGERS)} | {name: pa.string() for name in CATEGORIES}
    parts = []
    for part, split in FILES.items():
        table = pacsv.read_csv(
            source / f"wideresdnn_{part}.csv",
            read_options=pacsv.ReadOptions(column_names=COLUMNS),
            parse_options=pacsv.ParseOptions(delimiter="\t"),
            convert_options=pacsv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""]),
        )
        parts.append(table.append_column("split", pa.array([split] * table.num_rows)))
    whole = pa.concat_tables(parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(whole, target)
    return int(whole.num_rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: convert.py FOLDER_OF_TSV OUT.parquet")
    sys.stdout.write(f"{convert(Path(sys.argv[1]), Path(sys.argv[2]))} rows\n")
