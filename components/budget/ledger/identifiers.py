"""Under what name a dataset stands in the ledger, in bundles and in the service: one that tells nothing of its content.

A dataset's fingerprint, and the digest of the log it was made from, are plain hashes of private rows. Published, either
is an oracle: whoever knows all rows but one person's computes the hash with and without them, and sees which it is. No
epsilon covers that. But a ledger must know equal data again, or a second ingest of the same rows would be a new dataset
with a fresh budget.

Both are kept by one 256-bit secret a ledger: what is published is HMAC-SHA256 of the hash under it. Equal content has
equal identifiers in one ledger; without the secret an identifier is as good as random (HMAC-SHA256 as a pseudorandom
function), whatever is known of the content. Whoever has the secret can run the test above, so it is as private as the
dataset: whoever trains needs it; the service, and whoever reads a report or a bundle, does not.

The secret lies beside a SQLite ledger (`FILE.secret`, mode 0600, made when the first dataset is registered), or comes
from LAZYDP_LEDGER_SECRET, which a PostgreSQL ledger needs. Entries say which secret their identifier was made under: a
lost or exchanged secret, under which known data would look new, is refused instead of used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict, Unpack

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.state import Dataset


class Public(TypedDict, total=False):
    """What `Ledger.register_dataset` takes as it is: it tells nothing of the rows."""

    parents: Iterable[str]
    family: str
    default_family: str
    by: str | None


def register(
    ledger: Ledger,
    *,
    fingerprint: str,
    name: str,
    sources: Iterable[str] = (),
    user_column: str = "",
    places: Iterable[str] = (),
    **public: Unpack[Public],
) -> Dataset:
    """Make a dataset known to the ledger, or find it there; to be used wherever its content is at hand.

    Args:
        ledger: open for writing.
        fingerprint: of the encoded dataset, private.
        name: for people.
        sources: digests of what it was made from, private; datasets with a common one share users.
        user_column: name of the column that says who a row is about.
        places: where its rows were read from.
        public: parents, family and operator, as `Ledger.register_dataset` takes them.

    Returns:
        The dataset as the ledger publishes it.

    Raises:
        InputError: the ledger's secret is missing, or an unknown parent.
        PrivacyError: the secret is not the one that the ledger's datasets were registered under, or the ledger knows
            the dataset under another family.
    """
    datasets = ledger.state().datasets.values()
    secret = ledger.secret()
    sources = list(sources)
    # An older lazydp wrote the hashes themselves: what it knew stays one family with what it is now called.
    older = [
        known.identifier
        for known in datasets
        if not known.secret and (known.identifier == fingerprint or not set(sources).isdisjoint(known.sources))
    ]
    told: Public = {**public, "parents": [*public.get("parents", ()), *older]}
    return ledger.register_dataset(
        secret.identifier("dataset", fingerprint),
        name=name,
        sources=[secret.identifier("source", source) for source in sources],
        secret=secret.name,
        user_column=secret.identifier("user column", user_column) if user_column else "",
        places=[secret.identifier("place", place) for place in places],
        **told,
    )
