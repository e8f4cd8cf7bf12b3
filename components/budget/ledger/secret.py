"""The secret of a ledger: 256 bits under which it names datasets, and vouches for its head (`ledger.memory`).

It lies beside a SQLite ledger (`FILE.secret`, mode 0600, made with the first entry), or comes from
LAZYDP_LEDGER_SECRET, which a PostgreSQL ledger needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from lazydp.components.budget.storage.base import sqlite_path
from lazydp.components.shared.errors import InputError
from lazydp.components.shared.files import PRIVATE_FILE, partial_file, sync_directory

VARIABLE = "LAZYDP_LEDGER_SECRET"
_BYTES = 32
_TEXT = re.compile(r"[0-9a-f]{64}")
_NAME_DIGITS = 16


class LedgerSecret:
    """The secret of one ledger; `LedgerSecret.of` finds it."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of(cls, url: str) -> Self:
        """The secret of the ledger at `url`.

        Args:
            url: of the ledger, without its password.

        Raises:
            InputError: there is none, or what is there is not a secret.
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
        file = secret_file(ledger)
        try:
            return cls(_parsed(file.read_text().strip(), where=str(file)))
        except FileNotFoundError:
            raise InputError(
                f"the secret of ledger {ledger} is missing: it was {file}, or {VARIABLE}. Bring it back; without it "
                "data that the ledger knows would look new, and have a fresh budget"
            ) from None

    @classmethod
    def make(cls, ledger: Path, *, before: Callable[[Self], None]) -> Self:
        """Make the secret of a SQLite ledger that has none; of several processes one is the first.

        Args:
            ledger: the ledger's file.
            before: called with the secret before it has its name.
        """
        file = secret_file(ledger)
        text = secrets.token_hex(_BYTES)
        with partial_file(file, f"{text}\n".encode(), mode=PRIVATE_FILE) as temporary:
            before(cls(bytes.fromhex(text)))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)
        sync_directory(file.parent)
        return cls(_parsed(file.read_text().strip(), where=str(file)))

    @property
    def name(self) -> str:
        """Which secret it is, 16 hexadecimal digits: tells two apart and nothing of either."""
        return self._hashed("which secret", "")[:_NAME_DIGITS]

    def identifier(self, kind: Literal["dataset", "source", "user column", "place", "files"], digest: str) -> str:
        """What stands for a private digest where others may read it: 64 hexadecimal digits."""
        return self._hashed(kind, digest)

    def vouch(self, text: str) -> str:
        """A code over `text` that nobody can make who lacks the secret: 64 hexadecimal digits."""
        return self._hashed("remembered head", text)

    def _hashed(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}\0{text}".encode(), hashlib.sha256).hexdigest()


def _parsed(text: str, *, where: str) -> bytes:
    if not _TEXT.fullmatch(text):
        raise InputError(f"{where}: a ledger's secret is 64 hexadecimal digits, in lower case; found something else")
    return bytes.fromhex(text)


def secret_file(ledger: Path) -> Path:
    """Where the secret of a SQLite ledger lies."""
    return Path(f"{ledger}.secret")
