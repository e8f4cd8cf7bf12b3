"""Who a browser asks for: pages of elsewhere must not reach a service through the browser of somebody who can."""

from __future__ import annotations

import ipaddress

from lazydp.service.http.problems import Problem
from lazydp.service.settings import Settings

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_MOST_PASSED = 64
_OWN_SITE = frozenset({b"same-origin", b"none"})


class Origins:
    """Checks the Host and Origin headers, which a page of elsewhere cannot choose.

    A service on loopback without keys is open to every page in a browser on the same machine whose name resolves to
    loopback (DNS rebinding), so its Host must be loopback. A browser that sends what changes something says by Origin
    which page asks, so that one must be of the service itself, keys or not: a browser sends a remembered key for any.
    """

    def __init__(self, settings: Settings) -> None:
        self._allowed = frozenset(name.lower() for name in settings.allowed_hosts)
        self._loopback_only = settings.is_keyless_loopback
        # Hosts that passed before: most requests name one of a few.
        self._passed: set[bytes] = set()

    def check(self, method: str, headers: dict[bytes, bytes]) -> None:
        """Let a request pass, or raise.

        Args:
            method: upper case.
            headers: lower-case names.

        Raises:
            Problem: 421 for a Host that is not the service's, 403 for a page of elsewhere.
        """
        given = headers.get(b"host", b"")
        if given and self._loopback_only and given not in self._passed:
            self._check_host(given)
        origin = headers.get(b"origin")
        if origin is None or method in _SAFE_METHODS or headers.get(b"sec-fetch-site") in _OWN_SITE:
            return
        host = given.decode("latin-1").lower()
        asking = origin.decode("latin-1").lower().partition("://")[2]
        if asking != host and _name(asking) not in self._allowed:
            raise Problem(403, "foreign-origin", "a page of another site may not ask this through a browser")

    def _check_host(self, given: bytes) -> None:
        if not self._is_own(_name(given.decode("latin-1").lower())):
            detail = "this Host is not the service's: ask by 127.0.0.1 or localhost, or list it in allowed_hosts"
            raise Problem(421, "foreign-host", detail)
        if len(self._passed) < _MOST_PASSED:
            self._passed.add(given)

    def _is_own(self, name: str) -> bool:
        if name in self._allowed or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _name(host: str) -> str:
    """A host without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
