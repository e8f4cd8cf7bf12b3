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

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.state import Dataset
from lazydp.components.budget.storage.base import sqlite_path
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_FILE, sync_directory

VARIABLE = "LAZYDP_LEDGER_SECRET"
_BYTES = 32
_TEXT = re.compile(r"[0-9a-f]{64}")
_NAME_DIGITS = 16


class LedgerSecret:
    """The secret of one ledger; `LedgerSecret.of` finds it."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of(cls, url: str, *, create: bool) -> Self:
        """The secret of the ledger at `url`.

        Args:
            url: of the ledger, without its password.
            create: whether to make one beside a SQLite ledger that has none.

        Raises:
            InputError: it is not to be made, or there is no place for it, or what is there is no secret.
        """
        given = os.environ.get(VARIABLE, "").strip()
        if given:
            return cls(_parsed(given, where=VARIABLE))
        ledger = sqlite_path(url)
        if ledger is None:
            raise InputError(
                f"ledger {url} has nowhere to keep its secret: set {VARIABLE} to 64 hexadecimal digits, made once with "
                "`python -c 'import secrets; print(secrets.token_hex())'` and kept where the ledger's password is"
            )
        file = Path(f"{ledger}.secret")
        if create and not file.exists():
            _make(file)
        try:
            return cls(_parsed(file.read_text().strip(), where=str(file)))
        except FileNotFoundError:
            raise InputError(
                f"the secret of ledger {ledger} is missing: it was {file}, or {VARIABLE}. Bring it back; without it "
                "data that the ledger knows would look new, and have a fresh budget"
            ) from None

    @property
    def name(self) -> str:
        """Which secret it is, 16 hexadecimal digits: tells two apart and nothing of either."""
        return self._hashed("which secret", "")[:_NAME_DIGITS]

    def identifier(self, kind: Literal["dataset", "source", "user column", "place"], digest: str) -> str:
        """What stands for a private digest where others may read it: 64 hexadecimal digits."""
        return self._hashed(kind, digest)

    def _hashed(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}\0{text}".encode(), hashlib.sha256).hexdigest()


def register(
    ledger: Ledger,
    *,
    fingerprint: str,
    name: str,
    sources: Iterable[str] = (),
    parents: Iterable[str] = (),
    family: str = "",
    default_family: str = "",
    user_column: str = "",
    places: Iterable[str] = (),
    by: str | None = None,
) -> Dataset:
    """Make a dataset known to the ledger, or find it there; to be used wherever its content is at hand.

    Args:
        ledger: open for writing.
        fingerprint: of the encoded dataset, private.
        name: for people.
        sources: digests of what it was made from, private; datasets with a common one share users.
        parents: datasets of the ledger that share users with this one.
        family: the declared name of its population; public.
        default_family: that of a dataset for which nobody declared one, here or before.
        user_column: name of the column that says who a row is about.
        places: where its rows were read from.
        by: who registers it; the operator by default.

    Returns:
        The dataset as the ledger publishes it.

    Raises:
        InputError: the ledger's secret is missing, or an unknown parent.
        PrivacyError: the secret is not the one that the ledger's datasets were registered under, or the ledger knows
            the dataset under another family.
    """
    datasets = ledger.state().datasets.values()
    secret = LedgerSecret.of(ledger.url, create=not any(dataset.secret for dataset in datasets))
    sources = list(sources)
    # An older lazydp wrote the hashes themselves: what it knew stays one family with what it is now called.
    older = [
        known.identifier
        for known in datasets
        if not known.secret and (known.identifier == fingerprint or not set(sources).isdisjoint(known.sources))
    ]
    return ledger.register_dataset(
        secret.identifier("dataset", fingerprint),
        name=name,
        parents=[*parents, *older],
        sources=[secret.identifier("source", source) for source in sources],
        secret=secret.name,
        family=family,
        default_family=default_family,
        user_column=secret.identifier("user column", user_column) if user_column else "",
        places=[secret.identifier("place", place) for place in places],
        by=by,
    )


def _parsed(text: str, *, where: str) -> bytes:
    if not _TEXT.fullmatch(text):
        raise InputError(f"{where}: a ledger's secret is 64 hexadecimal digits, in lower case; found something else")
    return bytes.fromhex(text)


def _make(file: Path) -> None:
    """Write a fresh secret; of several processes that do so at once one is the first, and the others find its."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w") as opened:
            os.fchmod(opened.fileno(), PRIVATE_FILE)
            opened.write(f"{secrets.token_hex(_BYTES)}\n")
            opened.flush()
            os.fsync(opened.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)
    finally:
        Path(temporary).unlink()
    sync_directory(file.parent)
