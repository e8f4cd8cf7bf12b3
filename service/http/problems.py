"""Errors as RFC 9457 problem documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"
_TYPE_PREFIX = "urn:lazydp:problem:"
_ERRORS_SHOWN = 20


class InvalidPart(BaseModel):
    """One thing that is wrong with a request."""

    pointer: str = Field(description="where: a JSON pointer into the body, or the name of a parameter")
    detail: str = Field(description="what is wrong")


class ProblemDocument(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="kind of problem: `urn:lazydp:problem:...`, or about:blank where status says it all")
    title: str
    status: int
    detail: str | None = Field(default=None, description="what happened, and what to do")
    instance: str | None = Field(default=None, description="the request's id, as in the logs: `urn:request:...`")
    errors: list[InvalidPart] | None = None


class Problem(Exception):  # noqa: N818 - named after RFC 9457
    """An answer that is an error.

    Args:
        status: HTTP status.
        kind: last part of the problem's type; None for about:blank.
        detail: what happened, and what to do. Never echoes what the user sent.
        headers: of the response.
        errors: (pointer, detail) of each invalid part.
    """

    def __init__(
        self,
        status: int,
        kind: str | None = None,
        detail: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(detail or kind or str(status))
        self.status = status
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})
        self.errors = errors

    @property
    def title(self) -> str:
        """The status in words."""
        return HTTPStatus(self.status).phrase

    def body(self, request_id: str | None) -> bytes:
        """The document."""
        document: dict[str, Any] = {
            "type": "about:blank" if self.kind is None else _TYPE_PREFIX + self.kind,
            "title": self.title,
            "status": self.status,
        }
        if self.detail is not None:
            document["detail"] = self.detail
        if request_id is not None:
            document["instance"] = f"urn:request:{request_id}"
        if self.errors is not None:
            document["errors"] = [{"pointer": pointer, "detail": detail} for pointer, detail in self.errors]
        return orjson.dumps(document)

    def response(self, request_id: str | None) -> Response:
        """The document as a response."""
        headers = {"cache-control": "no-store", **self.headers}
        return Response(self.body(request_id), self.status, headers=headers, media_type=MEDIA_TYPE)


def invalid(error: ValidationError, *, prefix: str = "") -> Problem:
    """422 for what pydantic refuses: where and why, without the values."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    if problems and problems[0]["type"] == "json_invalid":
        return Problem(400, "malformed-json", "the body is not JSON: " + problems[0]["msg"])
    return unprocessable([_part(problem["loc"], problem["msg"], prefix) for problem in problems])


def unprocessable(errors: Sequence[tuple[str, str]]) -> Problem:
    """422 for invalid parts."""
    shown = list(dict.fromkeys(errors))[:_ERRORS_SHOWN]
    where, why = shown[0] if shown else ("", "the request is not valid")
    return Problem(422, "invalid-request", f"{where}: {why}" if where else why, errors=shown)


def fault() -> Problem:
    """500 for what should not happen."""
    return Problem(500, "internal", "this is a fault of the service; the log has the details")


def _part(location: Sequence[int | str], message: str, prefix: str) -> tuple[str, str]:
    pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1")[:100] for part in location)
    return prefix + pointer, message.removeprefix("Value error, ")


def request_id(request: Request) -> str | None:
    """The id under which the request is logged."""
    found = request.scope.get("state", {}).get("request_id")
    return found if isinstance(found, str) else None


async def on_problem(request: Request, error: Exception) -> Response:
    """Handler for `Problem`."""
    assert isinstance(error, Problem)
    return error.response(request_id(request))


async def on_fault(request: Request, _: Exception) -> Response:
    """Handler for everything else, in place of the framework's plain text; the gateway logs it."""
    return fault().response(request_id(request))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler for what the framework itself refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    details = {
        404: "there is nothing at this path; /docs lists what there is",
        405: "this path does not take that method; the Allow header names those it takes",
    }
    return Problem(error.status_code, None, details.get(error.status_code), headers=error.headers).response(
        request_id(request)
    )


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Handler for parameters that the framework refuses."""
    assert isinstance(error, RequestValidationError)
    parts = [_part(problem["loc"][1:], problem["msg"], "") for problem in error.errors()]
    return unprocessable([(pointer.lstrip("/"), detail) for pointer, detail in parts]).response(request_id(request))
