"""Errors as RFC 9457 problem documents."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lazydp.service.conditions import BRANCHES

MEDIA_TYPE = "application/problem+json"
_TYPE_PREFIX = "urn:lazydp:problem:"
_ERRORS_SHOWN = 20
# Clients of the Open Inference Protocol read the `error` of an application/json document.
PROTOCOL_PATH = "/v2"
PROTOCOL_MEDIA_TYPE = "application/json"
# Where programs ask; anywhere else a person with a browser is told in HTML.
_FOR_PROGRAMS = ("/v1", "/metrics", "/healthz", "/readyz", "/openapi.json", "/assets/")


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
    error: str | None = Field(default=None, description="the detail, for clients of the Open Inference Protocol")


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
        """The document, with the `error` that clients of the Open Inference Protocol look for."""
        return orjson.dumps({**self._document(request_id), "error": self.detail or self.title})

    def rendered(self, request_id: str | None, *, path: str, accept: str) -> tuple[bytes, str]:
        """The document for who asked, and its media type.

        Args:
            request_id: as in the logs.
            path: that was asked for.
            accept: the Accept header.
        """
        if path.startswith(PROTOCOL_PATH):
            return self.body(request_id), PROTOCOL_MEDIA_TYPE
        if "text/html" in accept and not path.startswith(_FOR_PROGRAMS):
            return self._page(path).encode(), "text/html; charset=utf-8"
        return orjson.dumps(self._document(request_id)), MEDIA_TYPE

    def _document(self, request_id: str | None) -> dict[str, Any]:
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
        return document

    def _page(self, path: str) -> str:
        """A page whose links hold behind the prefix of any proxy."""
        first = "../" * (path.count("/") - 1) or "./"
        title = html.escape(f"{self.status} {self.title}")
        detail = html.escape((self.detail or "").rstrip(".") + ".")
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="stylesheet" href="{first}assets/page.css"></head><body><main><h1>{title}</h1><p>{detail}</p>'
            f'<p><a href="{first}">Back to the first page</a></p></main></body></html>'
        )

    def response(self, request_id: str | None, *, path: str, accept: str = "") -> Response:
        """The document as a response; arguments as for `rendered`."""
        body, media_type = self.rendered(request_id, path=path, accept=accept)
        return Response(
            body, self.status, headers={"cache-control": "no-store", **self.headers, "content-type": media_type}
        )


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
    named = [str(part) for part in location if part not in BRANCHES]
    pointer = "".join("/" + part.replace("~", "~0").replace("/", "~1")[:100] for part in named)
    return prefix + pointer, message.removeprefix("Value error, ")


def request_id(request: Request) -> str | None:
    """The id under which the request is logged."""
    found = request.scope.get("state", {}).get("request_id")
    return found if isinstance(found, str) else None


def refusal(request: Request, problem: Problem) -> Response:
    """What who sent `request` is told."""
    return problem.response(request_id(request), path=request.scope["path"], accept=request.headers.get("accept", ""))


async def on_problem(request: Request, error: Exception) -> Response:
    """Handler for `Problem`."""
    assert isinstance(error, Problem)
    return refusal(request, error)


async def on_fault(request: Request, _: Exception) -> Response:
    """Handler for everything else, in place of the framework's plain text; the gateway logs it."""
    return refusal(request, fault())


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler for what the framework itself refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    details = {
        404: "there is nothing at this path; /docs lists what there is",
        405: "this path does not take that method; the Allow header names those it takes",
    }
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = _allowed(request) or headers.get("Allow", "")
    return refusal(request, Problem(error.status_code, None, details.get(error.status_code), headers=headers))


def _allowed(request: Request) -> str:
    """The methods of a path. The framework names those of its first route only, where a path has several."""
    path = getattr(request.scope.get("route"), "path_format", None)
    return ", ".join(sorted(method.upper() for method in request.app.openapi()["paths"].get(path, ())))


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Handler for parameters that the framework refuses."""
    assert isinstance(error, RequestValidationError)
    parts = [_part(problem["loc"][1:], problem["msg"], "") for problem in error.errors()]
    return refusal(request, unprocessable([(pointer.lstrip("/"), detail) for pointer, detail in parts]))
