"""Cut a validation split from the training rows: `python validation.py DATA/interactions.parquet OUT.parquet`.

A fifth of the training rows, drawn at random, becomes the test split; the published test rows are left out.
"""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SHARE, SEED = 0.2, 15


def main(source: str, target: str) -> None:
    """Write the rows with their new split."""
    rows = pq.read_table(source, filters=pc.field("split") == "train")
    drawn = np.random.default_rng(SEED).random(rows.num_rows) < SHARE
    split = pa.array(np.where(drawn, "test", "train"))
    pq.write_table(rows.set_column(rows.schema.get_field_index("split"), "split", split), target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: validation.py INTERACTIONS.parquet OUT.parquet")
    main(*sys.argv[1:])
