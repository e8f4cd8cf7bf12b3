"""The Open Inference Protocol over gRPC, beside HTTP: the same models, keys and limits."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import structlog

from lazydp.components.shared.errors import UnavailableError
from lazydp.service.http.auth import KeyCheck
from lazydp.service.http.problems import Problem, fault
from lazydp.service.inference import metadata, repository
from lazydp.service.inference.infer import Transport, infer
from lazydp.service.serving.context import Context

if TYPE_CHECKING:
    import grpc

# The path over HTTP that asks for the same, which says what key opens a method.
_PATHS = {
    "ServerLive": "/v2/health/live",
    "ServerReady": "/v2/health/ready",
    "RepositoryIndex": "/v2/repository/index",
    "RepositoryModelLoad": "/v2/repository/models/load",
    "RepositoryModelUnload": "/v2/repository/models/unload",
}
_ANY_PATH = "/v2/models"
# gRPC's codes for statuses of HTTP.
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "FAILED_PRECONDITION",
    413: "RESOURCE_EXHAUSTED",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
_log = structlog.get_logger("lazydp.service")


class GrpcServer:
    """Answers the protocol's methods on a port of its own, on the event loop of the service."""

    def __init__(self, context: Context, key_check: KeyCheck) -> None:
        """Make the server; `bind` takes its address.

        Raises:
            UnavailableError: grpcio is not installed.
        """
        try:
            import grpc.aio  # noqa: PLC0415 - an extra

            from lazydp.service.inference import grpc_calls, grpc_messages  # noqa: PLC0415
        except ModuleNotFoundError:
            raise UnavailableError("setting grpc_port: grpcio is not installed: pip install 'lazydp[grpc]'") from None
        self._grpc = grpc
        self._calls = grpc_calls
        self._messages = grpc_messages
        self._context = context
        self._key_check = key_check
        settings = context.settings
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=settings.max_concurrent,
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_metadata_size", settings.max_head_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))

    def bind(self, host: str, port: int) -> None:
        """Take the address.

        Raises:
            UnavailableError: the address cannot be bound.
        """
        settings = self._context.settings
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if settings.tls_certificate is None or settings.tls_key is None:
                self._server.add_insecure_port(address)
                return
            pair = (settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())
            self._server.add_secure_port(address, self._grpc.ssl_server_credentials([pair]))
        except (RuntimeError, OSError):
            raise UnavailableError(f"cannot serve gRPC on {host} port {port}; choose another grpc_port") from None

    async def run(self) -> None:
        """Answer until cancelled; calls under way are answered first."""
        await self._server.start()
        try:
            await self._server.wait_for_termination()
        finally:
            await self._server.stop(self._context.settings.drain_s)

    def _handlers(self) -> Any:
        methods = {name: self._handler(name) for name in self._messages.METHODS}
        return self._grpc.method_handlers_generic_handler(self._messages.SERVICE, methods)

    def _handler(self, name: str) -> Any:
        request, response = (self._messages.message(f"{name}{part}") for part in ("Request", "Response"))
        return self._grpc.unary_unary_rpc_method_handler(
            functools.partial(self._answer, name, getattr(self, f"_{_snake(name)}")),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )

    async def _answer(
        self, name: str, method: Callable[[Any], Awaitable[Any]], request: Any, call: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        """One method: its key, its time, its place in metrics, and its problems as gRPC has them."""
        started, status = time.perf_counter(), 200
        try:
            headers = {key.encode(): _bytes(value) for key, value in call.invocation_metadata() or ()}
            self._key_check.admit(_PATHS.get(name, _ANY_PATH), headers)
            async with asyncio.timeout(self._context.settings.request_timeout_s):
                return await method(request)
        except Problem as problem:
            status = problem.status
            await self._refuse(call, problem)
        except TimeoutError:
            status = 503
            await call.abort(self._grpc.StatusCode.DEADLINE_EXCEEDED, "the call was not answered in time")
        except Exception as error:
            status = 500
            _log.error("call failed", method=name, error=type(error).__name__)
            await self._refuse(call, fault())
        finally:
            route = f"/{self._messages.SERVICE}/{name}"
            self._context.metrics.observe(route, "POST", status, time.perf_counter() - started)

    async def _refuse(self, call: grpc.aio.ServicerContext[Any, Any], problem: Problem) -> None:
        code = getattr(self._grpc.StatusCode, _CODES.get(problem.status, "UNKNOWN"))
        await call.abort(code, problem.detail or problem.title)

    async def _server_live(self, _: Any) -> Any:
        return self._messages.message("ServerLiveResponse")(live=True)

    async def _server_ready(self, _: Any) -> Any:
        is_ready = self._context.registry.ready and not self._context.draining
        return self._messages.message("ServerReadyResponse")(ready=is_ready)

    async def _model_ready(self, request: Any) -> Any:
        try:
            self._context.served(request.name, request.version or None)
        except Problem as problem:
            if problem.status != 404:
                raise
            return self._messages.message("ModelReadyResponse")(ready=False)
        return self._messages.message("ModelReadyResponse")(ready=True)

    async def _server_metadata(self, _: Any) -> Any:
        return self._messages.message("ServerMetadataResponse")(**metadata.server_metadata().model_dump())

    async def _model_metadata(self, request: Any) -> Any:
        served = self._context.served(request.name, request.version or None)
        versions = () if request.version else self._context.versions(request.name)
        document = metadata.model_metadata(request.name, served, versions=versions)
        return self._messages.message("ModelMetadataResponse")(**document.model_dump())

    async def _model_infer(self, request: Any) -> Any:
        transport = Transport(
            functools.partial(self._calls.read, request), functools.partial(self._calls.write, request.model_name)
        )
        return await infer(self._context, request.model_name, request.model_version or None, transport)

    async def _model_config(self, request: Any) -> Any:
        served = self._context.served(request.name, request.version or None)
        document = metadata.model_config(request.name, served).model_dump()
        return self._messages.message("ModelConfigResponse")(config=document)

    async def _model_statistics(self, request: Any) -> Any:
        served = [self._context.served(request.name, request.version or None)] if request.name else None
        found = [metadata.statistics(version).model_dump() for version in served or self._context.registry.versions()]
        return self._messages.message("ModelStatisticsResponse")(model_stats=found)

    async def _repository_index(self, request: Any) -> Any:
        models = [model.model_dump() for model in repository.index(self._context, ready=request.ready)]
        return self._messages.message("RepositoryIndexResponse")(models=models)

    async def _repository_model_load(self, request: Any) -> Any:
        repository.check_parameters(self._calls.parameters(request.parameters))
        loaded = await repository.load(self._context, request.model_name or request.repository_name)
        return self._messages.message("RepositoryModelLoadResponse")(model_name=loaded.name, isLoaded=True)

    async def _repository_model_unload(self, request: Any) -> Any:
        repository.check_parameters(self._calls.parameters(request.parameters))
        gone = await repository.unload(self._context, request.model_name or request.repository_name)
        return self._messages.message("RepositoryModelUnloadResponse")(model_name=gone.name, isUnloaded=True)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
