"""A service over bundles of untrained models."""

from support.service_fixtures import bundles, client, start

__all__ = ["bundles", "client", "start"]
