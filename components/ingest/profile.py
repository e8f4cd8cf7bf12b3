"""A profile of a dataset, from its rows: for its owner, and private as they are. The card of a task is in `card`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.page import Facts, page

NOTICE = "private: computed from private rows without noise; for the data's owner, not to be published"
_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SHARES = (0.01, 0.1, 0.5)
# A suggested bound keeps so many of the rows.
_KEEP = 0.9
_OVER_BOUND = "over_max_examples_per_user"


def profile(data: EncodedDataset) -> list[Facts]:
    """What the dataset holds, by heading."""
    return [section for section in (_counts(data), _rejected(data), _users(data), _items(data)) if section.rows]


def as_text(sections: list[Facts], *, name: str) -> str:
    """The profile for a terminal."""
    lines = [f"{name}: {NOTICE}"]
    for section in sections:
        lines += ["", section.title]
        lines += [f"  {what:46} {figure:>14}" for what, figure in section.rows]
    return "\n".join(lines)


def as_html(sections: list[Facts], *, name: str) -> str:
    """The profile as one page without anything from elsewhere."""
    return page(f"Dataset {name}", audience="private", sections=sections)


def _counts(data: EncodedDataset) -> Facts:
    counts = data.manifest.counts
    rows = [
        ("rows of the input", f"{data.manifest.source.rows:,}"),
        ("training examples", f"{counts.train:,}"),
        ("examples held out", f"{counts.test:,}"),
    ]
    if data.spec.user is not None:
        rows.append(("users", f"{counts.users:,}"))
    if data.spec.item is not None:
        rows.append(("items of the catalogue", f"{counts.items:,}"))
    if counts.users and counts.items:
        filled = counts.train / (counts.users * counts.items)
        rows.append(("sparsity: pairs of user and item without a row", f"{1 - min(filled, 1):.4%}"))
    label = np.asarray(data.split("train").label)
    if len(label):
        rows.append(("positive training examples", f"{np.mean(label >= 0.5):.1%}"))
    return Facts("Counts", tuple(rows))


def _rejected(data: EncodedDataset) -> Facts:
    total = max(data.manifest.source.rows, 1)
    rejected = sorted(data.manifest.rejected.items(), key=lambda pair: -pair[1])
    rows = tuple((reason, f"{count:,} ({count / total:.1%})") for reason, count in rejected if count)
    return Facts("Rows left out", rows)


def _users(data: EncodedDataset) -> Facts:
    """How much users contribute, and what other bounds would keep of the positive rows."""
    if data.spec.user is None or data.spec.item is None:
        return Facts("Users", ())
    lengths = np.diff(data.seen_items().offsets.numpy())
    total = int(lengths.sum())
    if total == 0:
        return Facts("Users", ())
    bound = data.manifest.max_examples_per_user
    kept = {k: float(np.minimum(lengths, k).sum() / total) for k in _BOUNDS}
    rows = [
        ("median of positive training rows of a user", f"{np.median(lengths):g}"),
        ("most of a user", f"{lengths.max():,}"),
    ]
    if bound is not None:
        dropped = data.manifest.rejected.get(_OVER_BOUND, 0)
        trained = data.manifest.counts.train
        rows.append((f"users at the bound of {bound}", f"{np.mean(lengths >= bound):.1%}"))
        rows.append(("training rows that the bound drops", f"{dropped / max(trained + dropped, 1):.1%}"))
    rows += [(f"a bound of {k} keeps of the positive rows", f"{share:.1%}") for k, share in _until_all(kept)]
    suggested = next((k for k, share in kept.items() if share >= _KEEP), _BOUNDS[-1])
    rows.append((f"smallest of these that keeps {_KEEP:.0%}", f"{suggested}"))
    rows.append(("(a bound chosen by these figures is chosen by private rows)", ""))
    return Facts("Users", tuple(rows))


def _until_all(kept: dict[int, float]) -> Iterator[tuple[int, float]]:
    for bound, share in kept.items():
        yield bound, share
        if share == 1:
            return


def _items(data: EncodedDataset) -> Facts:
    """The popularity curve: what share of the training examples falls to the most popular items."""
    item: Any = data.split("train").item
    if item is None or len(item) == 0:
        return Facts("Items", ())
    counts = np.sort(np.bincount(item, minlength=data.manifest.counts.items + 1)[1:])[::-1]
    share = np.cumsum(counts) / counts.sum()
    rows = [
        (f"examples of the {part:.0%} most popular items", f"{share[max(1, round(part * len(counts))) - 1]:.1%}")
        for part in _SHARES
    ]
    rows.append(("items without a training example", f"{np.mean(counts == 0):.1%}"))
    return Facts("Items", tuple(rows))
