"""Logs of the service: one JSON object a line, with request ids, without ids of users or items."""

from __future__ import annotations

import logging
import sys

import orjson
import structlog


def configure(level: str) -> None:
    """Set up structlog, and send the logs of libraries the same way."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    handler = _Forward()
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(number)
    # uvicorn's own access log would print paths, and paths hold user ids.
    access = logging.getLogger("uvicorn.access")
    access.handlers = []
    access.propagate = False
    access.disabled = True


class _Forward(logging.Handler):
    """Hands records of the standard library to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger("lazydp.service").log(
            record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
        )
