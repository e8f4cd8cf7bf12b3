"""What is remembered of a ledger outside its database, so that no rewritten, shortened or older one is decided on.

The chain of entries shows an edit, not that its end is missing, nor that somebody rewrote it all. So the number and the
digest of the last entry are kept beside the ledger's secret, under a code that nobody can make who lacks it, and
compared before every decision:

    FILE.head    {"head": "41:0f3c...", "next": null, "code": "..."}

`next` is written before an entry is committed to the database, and removed after: whatever moment a process is killed
at, the ledger ends at one of the two. A SQLite ledger must end exactly there. A PostgreSQL ledger is written to from
several machines, each of which remembers what it saw (in XDG_STATE_HOME/lazydp, by default ~/.local/state/lazydp):
there the chain must go on from that entry.

Against whoever can read the secret and write these files, keep heads elsewhere (`lazydp budget verify --expect-head`;
every bundle holds one).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lazydp.components.budget.ledger.secret import LedgerSecret
from lazydp.components.budget.storage.base import sqlite_path
from lazydp.components.budget.storage.entries import Entry, head_of
from lazydp.components.shared.errors import FormatError, IntegrityError
from lazydp.components.shared.files import PRIVATE_DIRECTORY, PRIVATE_FILE, read_json, write_json

_FORMAT_VERSION = 1
# Entries of a version before this one were written by a lazydp that remembered nothing.
_REMEMBERED_SINCE = 3
_REMEDY = (
    "Bring the ledger back from a copy that has its last entries; or, if `lazydp budget verify` finds no problem and "
    "its head is one that you kept elsewhere, accept it with `lazydp budget verify --remember`"
)


@dataclass(frozen=True, slots=True)
class HeadMemory:
    """The remembered head of one ledger.

    Attributes:
        file: where it is kept.
        secret: of the ledger.
        shown: the ledger's URL, without a password.
        exact: whether the ledger has to end there, or may go on from there.
    """

    file: Path
    secret: LedgerSecret
    shown: str
    exact: bool

    @classmethod
    def of(cls, shown: str, secret: LedgerSecret) -> HeadMemory:
        """The memory of the ledger at the URL `shown`."""
        path = sqlite_path(shown)
        if path is not None:
            return cls(Path(f"{path}.head"), secret, shown, exact=True)
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        folder = Path(state) / "lazydp"
        name = hashlib.sha256(f"{shown}\0{secret.name}".encode()).hexdigest()[:32]
        return cls(folder / f"{name}.head", secret, shown, exact=False)

    def check(self, entries: Sequence[Entry]) -> None:
        """Refuse a ledger that does not end where it is remembered to.

        Args:
            entries: of the ledger, whose chain holds.

        Raises:
            IntegrityError: it was cut, emptied, replaced, rewritten or written to by something else; or the memory is
                missing or not that of this ledger.
        """
        remembered = self._read()
        if remembered is None:
            self._check_forgotten(entries)
            return
        heads = {head_of(entry) for entry in entries} | {head_of(None)}
        last = head_of(entries[-1] if entries else None)
        if last in remembered:
            return
        if remembered[0] not in heads:
            ends = f"ends at entry {len(entries)}" if entries else "is empty"
            raise IntegrityError(
                f"ledger {self.shown} {ends}, and it held entry {remembered[0][:20]}... once: entries were cut off or "
                f"rewritten, or another or older file was put in its place. {_REMEDY}"
            )
        if self.exact:
            raise IntegrityError(
                f"ledger {self.shown} goes on after entry {remembered[0][:20]}..., where lazydp left it: an older "
                f"lazydp, or something else, wrote to it. {_REMEDY}"
            )

    def intend(self, last: Entry | None, entry: Entry) -> None:
        """Remember that `entry` is about to follow `last`."""
        self._write(head_of(last), head_of(entry))

    def confirm(self, last: Entry | None) -> None:
        """Remember that the ledger ends at `last`."""
        self._write(head_of(last), None)

    def exists(self) -> bool:
        """Whether anything is remembered."""
        return self.file.exists()

    def _check_forgotten(self, entries: Sequence[Entry]) -> None:
        if self.exact and was_remembered(entries):
            raise IntegrityError(
                f"{self.file}, which says where ledger {self.shown} ends, is missing: bring it back. {_REMEDY}"
            )

    def _read(self) -> tuple[str, str | None] | None:
        if not self.file.exists():
            return None
        try:
            document = read_json(self.file, format_version=_FORMAT_VERSION, what="memory of a ledger")
            head, following, code = document["head"], document["next"], document["code"]
        except (KeyError, TypeError, FormatError) as error:
            raise IntegrityError(f"{self.file} is damaged: {error}. {_REMEDY}") from error
        if not hmac.compare_digest(str(code), self._code(head, following)):
            raise IntegrityError(
                f"{self.file} was not written under the secret of ledger {self.shown}: it was changed, or is another "
                f"ledger's. {_REMEDY}"
            )
        return head, following

    def _write(self, head: str, following: str | None) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_DIRECTORY)
        document = {"head": head, "next": following, "code": self._code(head, following)}
        write_json(self.file, document, format_version=_FORMAT_VERSION, mode=PRIVATE_FILE)

    def _code(self, head: object, following: object) -> str:
        return self.secret.vouch(f"{self.shown if not self.exact else ''}\0{head}\0{following}")


def was_remembered(entries: Sequence[Entry]) -> bool:
    """Whether whoever wrote the last entry remembered it; an older lazydp did not."""
    version = entries[-1].content().get("format_version") if entries else None
    return isinstance(version, int) and version >= _REMEMBERED_SINCE
