"""API keys: who may ask what. Keys are stored as digests and compared in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence

from lazydp.service.http.problems import Problem
from lazydp.service.settings import ApiKey, Scope

# Health alone is answered to everybody.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
_CHALLENGE = 'Bearer realm="lazydp", Basic realm="lazydp"'
_SCOPES: tuple[tuple[str, frozenset[Scope]], ...] = (
    ("/v1/privacy", frozenset({"budget"})),
    ("/v1/", frozenset({"recommend"})),
    ("/v2/repository", frozenset({"admin"})),
    ("/v2", frozenset({"recommend"})),
    ("/metrics", frozenset({"metrics"})),
    ("/report", frozenset({"budget"})),
    ("/try", frozenset({"recommend"})),
    ("/traffic", frozenset({"metrics"})),
)


def make_key() -> tuple[str, str]:
    """A fresh key of 256 random bits, and its digest for the configuration."""
    key = secrets.token_urlsafe(32)
    return key, digest(key)


def digest(key: str) -> str:
    """Hexadecimal SHA-256. Keys carry full entropy, so no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def needed_scopes(path: str) -> frozenset[Scope]:
    """Scopes that a path asks for; none for documents, which any key opens."""
    if path == "/":
        return frozenset({"budget"})
    for prefix, scopes in _SCOPES:
        if path.startswith(prefix):
            return scopes
    return frozenset()


class KeyCheck:
    """Decides by path and headers whether a request is let in."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def admit(self, path: str, headers: dict[bytes, bytes]) -> str | None:
        """Let a request in, or raise.

        Args:
            path: of the request.
            headers: lower-case names.

        Returns:
            Name of the key, None where no keys are configured or the path is open.

        Raises:
            Problem: 401 without a key or with a wrong one, 403 with one of another scope.
        """
        if not self._keys or path in OPEN_PATHS:
            return None
        presented = _presented(headers)
        if presented is None:
            raise Problem(401, "no-key", "an API key is needed: Authorization: Bearer ...", headers=_challenge())
        key = self._find(presented)
        if key is None:
            raise Problem(401, "wrong-key", "this API key is not known", headers=_challenge())
        missing = needed_scopes(path) - key.scopes
        if missing:
            raise Problem(403, "wrong-scope", f"this path needs a key of scope {' and '.join(sorted(missing))}")
        return key.name

    def _find(self, presented: str) -> ApiKey | None:
        found = None
        presented_digest = digest(presented)
        # Every key is compared, in constant time, whether one matched before or not.
        for key in self._keys:
            if hmac.compare_digest(key.sha256, presented_digest):
                found = key
        return found


def _challenge() -> dict[str, str]:
    return {"www-authenticate": _CHALLENGE}


def _presented(headers: dict[bytes, bytes]) -> str | None:
    own = headers.get(b"x-api-key")
    if own is not None:
        return own.decode("latin-1")
    scheme, _, rest = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        # What a browser sends when it asks its user: the key is the password.
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None
