"""Make a log of a large catalogue: `python make.py FOLDER`.

Popularity falls as 1 / rank; half of what a user takes is of the user's own three categories. For measuring what a
start of a large catalogue takes in time and memory; nothing is learned about people.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

CATEGORIES, OWN = 100, 3


def main() -> None:
    """Write interactions.parquet, items.parquet and spec.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--each", type=int, default=100, help="interactions of every user")
    given = parser.parse_args()
    random = np.random.default_rng(0)
    given.folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(_log(random, given.users, given.items, given.each), given.folder / "interactions.parquet")
    prices = random.lognormal(3.0, 1.0, given.items)
    items = {"item": np.arange(given.items), "category": np.arange(given.items) % CATEGORIES, "price": prices}
    pq.write_table(pa.table(items), given.folder / "items.parquet")
    (given.folder / "spec.yaml").write_text(yaml.safe_dump(_spec(given.users, given.items), sort_keys=False))


def _log(random: np.random.Generator, users: int, items: int, each: int) -> pa.Table:
    """Interactions in order of time. Item i is of category i mod 100, and the smaller i, the more popular it is."""
    user = np.repeat(np.arange(users), each)
    category = random.integers(0, CATEGORIES, (users, OWN))[user, random.integers(0, OWN, len(user))]
    within = _zipf(random, items // CATEGORIES, len(user)) * CATEGORIES + category
    item = np.where(random.random(len(user)) < 0.5, within, _zipf(random, items, len(user)))
    columns = {"user": user, "item": item, "time": random.integers(0, 2**30, len(user))}
    return pa.table(columns).sort_by("time")


def _zipf(random: np.random.Generator, ranks: int, size: int) -> npt.NDArray[np.int64]:
    """Ranks from 0, about in proportion to 1 / (1 + rank): the exponential of a uniform number."""
    return np.asarray(np.floor((ranks + 1.0) ** random.random(size)) - 1).astype(np.int64).clip(0, ranks - 1)


def _spec(users: int, items: int) -> dict[str, object]:
    codes = {"kind": "integer", "size": CATEGORIES}
    return {
        "format_version": 1,
        "name": "large-catalogue",
        "user": {"column": "user", "vocabulary": {"kind": "integer", "size": users}},
        "item": {"column": "item", "vocabulary": {"kind": "integer", "size": items}},
        "timestamp": "time",
        "label": {"kind": "implicit"},
        "max_examples_per_user": 100,
        "history": {"max_length": 100, "pooling": "recent"},
        "split": {"kind": "leave_last_out"},
        "items": {"path": "items.parquet", "key": "item"},
        "features": [
            {"name": "category", "source": "item", "kind": "single", "vocabulary": codes},
            {"name": "price", "source": "item", "kind": "dense", "bounds": [1, 1000], "transform": "log1p"},
        ],
    }


if __name__ == "__main__":
    main()
