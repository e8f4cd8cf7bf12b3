"""Make a click log whose tables weigh as much as you say: `python make.py FOLDER --gib 10`.

Twenty-six categories with uniform ids, the hardest case for lazy noise (no row is read twice soon), thirteen numbers,
and labels that some of the categories decide. For measuring what large tables cost; nothing is learned about people.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

CATEGORIES, NUMBERS, DIM = 26, 13, 128


def main() -> None:
    """Write interactions.parquet and spec.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=10.0, help="of float32 tables, with embedding_dim 128")
    parser.add_argument("--examples", type=int, default=200_000)
    given = parser.parse_args()
    buckets = round(given.gib * 2**30 / (4 * DIM * CATEGORIES))
    given.folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(_log(given.examples, buckets), given.folder / "interactions.parquet")
    (given.folder / "spec.yaml").write_text(yaml.safe_dump(_spec(buckets), sort_keys=False))


def _log(examples: int, buckets: int) -> pa.Table:
    random = np.random.default_rng(0)
    ids = random.integers(0, buckets, size=(CATEGORIES, examples))
    clicked = (ids[:4] % 2).sum(axis=0) + random.normal(size=examples) > 2
    columns = {f"c{number + 1}": pa.array(column.astype(str)) for number, column in enumerate(ids)}
    columns |= {f"i{number + 1}": pa.array(random.random(examples)) for number in range(NUMBERS)}
    split = np.where(random.random(examples) < 0.95, "train", "test")
    return pa.table({**columns, "label": pa.array(clicked.astype(np.int8)), "split": pa.array(split)})


def _spec(buckets: int) -> dict[str, object]:
    numbers = [{"name": f"i{number + 1}", "kind": "dense", "bounds": [0, 1]} for number in range(NUMBERS)]
    categories = [
        {
            "name": f"c{number + 1}",
            "kind": "single",
            "vocabulary": {"kind": "hashed", "buckets": buckets, "salt": f"large-c{number + 1}"},
        }
        for number in range(CATEGORIES)
    ]
    return {
        "format_version": 1,
        "name": "large-tables",
        "label": {"kind": "column", "column": "label"},
        "split": {"kind": "column", "column": "split", "train": "train", "test": "test"},
        "features": numbers + categories,
    }


if __name__ == "__main__":
    main()
