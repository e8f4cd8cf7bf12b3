"""The application: routes, errors, life cycle. `create_app` is all that a server needs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lazydp.service.console import interface, traffic
from lazydp.service.console import privacy as privacy_page
from lazydp.service.console import recommendations as trial_page
from lazydp.service.grpc_server import GrpcServer
from lazydp.service.http.auth import KeyCheck
from lazydp.service.http.connections import Connections
from lazydp.service.http.exchange import Receive, Scope, Send
from lazydp.service.http.gateway import Direct, Gateway
from lazydp.service.http.metrics import Metrics
from lazydp.service.http.problems import Problem, on_fault, on_http_exception, on_problem, on_validation_error
from lazydp.service.http.tracing import Tracing
from lazydp.service.http.traffic import Traffic
from lazydp.service.routes import health, inference_protocol, models, openapi, privacy, recommendations
from lazydp.service.serving.background import Background
from lazydp.service.serving.budget import BudgetSource
from lazydp.service.serving.context import Context
from lazydp.service.serving.registry import Registry
from lazydp.service.serving.shadow import Shadow
from lazydp.service.serving.split import Split
from lazydp.service.settings import Settings, load_settings


class Service(FastAPI):
    """FastAPI behind the gateway, with the whole OpenAPI document.

    The gateway stands before the framework rather than among its middlewares, so that a request which needs nothing of
    the framework passes by all of it.
    """

    gateway: Gateway
    connections: Connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle whatever the server brings."""
        await self.gateway(scope, receive, send)

    async def framework(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle what passed the gateway."""
        await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            self.openapi_schema = openapi.build(self)
        return self.openapi_schema


def create_app(settings: Settings, *, tracing: Tracing | None = None) -> Service:
    """The service with `settings`; bundles are brought in when it starts, unless its registry was started before.

    `tracing` makes its spans; left out, the settings say whether and where there are any.
    """
    if tracing is None and settings.tracing:
        tracing = Tracing()
    metrics = Metrics()
    registry = Registry(settings, metrics)
    context = Context(
        settings=settings,
        registry=registry,
        budget=BudgetSource(settings.ledger),
        metrics=metrics,
        traffic=Traffic(metrics),
        background=Background(metrics),
    )

    if settings.weights:
        context.split = Split(settings.weights, salt=settings.split_salt)
    if settings.shadow is not None:
        shadowed = functools.partial(context.ranker, settings.shadow)
        context.shadow = Shadow(settings.shadow, ranker=shadowed, places=settings.shadow_queue, metrics=metrics)
    key_check = KeyCheck(settings.api_keys)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not registry.ready:
            await asyncio.to_thread(registry.start)
        context.background.keep("watch for versions", registry.watch)
        context.background.keep("count traffic", context.traffic.keep)
        if context.shadow is not None:
            context.background.keep("shadow", context.shadow.run)
        if settings.grpc_port is not None:
            context.background.keep("gRPC", _grpc_runs(context, key_check, settings.grpc_port))
        try:
            yield
        finally:
            await context.background.close()
            if context.shadow is not None:
                context.shadow.close()
            registry.close()
            context.budget.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = Service(
        title="lazydp",
        lifespan=lifespan,
        # FastAPI's own pages of documentation load scripts from elsewhere; `page` serves one that does not.
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        # Spans of the framework hold paths, and paths hold ids of users: `tracing` makes others.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.context = context
    for router in (
        recommendations.router,
        privacy.router,
        models.router,
        inference_protocol.router,
        health.router,
        privacy_page.router,
        trial_page.router,
        traffic.router,
        interface.router,
    ):
        app.include_router(router)
    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(Exception, on_fault)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.connections = Connections(settings, metrics)
    app.gateway = Gateway(
        app.framework,
        settings=settings,
        metrics=metrics,
        key_check=key_check,
        tracing=tracing,
        connections=app.connections,
        direct={
            ("POST", "/v1/recommendations"): Direct(
                functools.partial(recommendations.recommended, context),
                functools.partial(recommendations.recommended_at_once, context),
            )
        },
    )
    return app


def _grpc_runs(context: Context, key_check: KeyCheck, port: int) -> Callable[[], Awaitable[None]]:
    """What answers gRPC until it is cancelled. The first server is bound here, so that a taken port ends the start.

    Raises:
        UnavailableError: grpcio is not installed, or the address cannot be bound.
    """

    def bound() -> GrpcServer:
        server = GrpcServer(context, key_check)
        server.bind(context.settings.host, port)
        return server

    first = [bound()]

    async def run() -> None:
        server = first.pop() if first else bound()
        await server.run()

    return run


def document() -> dict[str, Any]:
    """The OpenAPI document of the service, without starting one."""
    found: dict[str, Any] = create_app(load_settings()).openapi()
    return found
