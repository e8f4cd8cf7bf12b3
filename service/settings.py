"""Settings of the service: environment variables LAZYDP_SERVE_*, a YAML file, or options of `lazydp serve`."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from lazydp.components.shared.errors import InputError
from lazydp.components.shared.frozen_model import FrozenModel

Scope = Literal["recommend", "budget", "metrics", "admin"]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ApiKey(FrozenModel):
    """A key that the service accepts; only its digest is stored (`lazydp serve --make-key` prints both).

    Attributes:
        name: whose it is; appears in logs.
        sha256: hexadecimal SHA-256 of the key.
        scopes: what it opens; none implies another.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]


class Settings(BaseSettings):
    """Everything about a running service that can be chosen. Options win over environment, environment over file."""

    model_config = SettingsConfigDict(
        env_prefix="LAZYDP_SERVE_", env_nested_delimiter="__", extra="forbid", frozen=True, yaml_file=None
    )

    bundles: Annotated[
        tuple[Path, ...],
        Field(description="bundle folders (or links to the version in use, which are watched); first is the default"),
    ] = ()
    named_bundles: Annotated[
        dict[Annotated[str, Field(pattern=_NAME)], Path],
        Field(description="further bundles by the name that each is served by, such as two versions of one model"),
    ] = {}
    weights: Annotated[
        dict[str, Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]],
        Field(description="shares of served names in requests that name no model (or `name`), dealt by split_key"),
    ] = {}
    split_salt: Annotated[str, Field(max_length=256, description="another text deals the keys of a split anew")] = (
        "lazydp"
    )
    shadow: Annotated[
        str | None, Field(description="served name that ranks a copy of each request that names no model (or `name`)")
    ] = None
    shadow_queue: Annotated[PositiveInt, Field(description="copies that may wait for it; more are dropped")] = 256
    name: Annotated[
        str | None,
        Field(
            description="further name of the default model, such as that of a KServe InferenceService", pattern=_NAME
        ),
    ] = None
    aliases: Annotated[dict[str, str], Field(description="further names of models: name -> the model's own")] = {}
    repository: Annotated[
        Path | None, Field(description="folder whose bundles POST /v2/repository/models/{name}/load may bring in")
    ] = None
    state_file: Annotated[
        Path | None,
        Field(
            description="file that remembers models loaded and unloaded by request; without it a restart forgets them"
        ),
    ] = None
    ledger: Annotated[str | None, Field(description="ledger URL, read only; without it the statement alone")] = None
    host: Annotated[str, Field(description="address to bind")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to bind; 0 takes a free one and prints it")] = 8000
    grpc_port: Annotated[
        int | None,
        Field(ge=1, le=65535, description="port of the Open Inference Protocol over gRPC (extra: grpc); null for none"),
    ] = None
    root_path: Annotated[
        str,
        Field(description="prefix that a proxy adds, such as /recs", pattern=r"^(/[\w.~-]+)*$"),
    ] = ""
    port_file: Annotated[Path | None, Field(description="file to write the port to once the service is ready")] = None
    allow_test_key: Annotated[bool, Field(description="serve bundles made under a noise key for tests")] = False
    allow_non_private: Annotated[bool, Field(description="serve bundles trained without privacy")] = False
    verify: Annotated[bool, Field(description="read every byte of a bundle and compare digests")] = True
    require_signature: Annotated[
        tuple[Path, ...],
        Field(description="PEM files of Ed25519 public keys; only bundles that one of them signed are served"),
    ] = ()
    copy_bundles: Annotated[
        bool, Field(description="serve a private copy of each bundle, which nobody can change in place")
    ] = True
    copy_folder: Annotated[
        Path | None, Field(description="where these copies lie; null for the system's folder of temporary files")
    ] = None
    api_keys: Annotated[
        tuple[ApiKey, ...],
        Field(description="accepted keys: name, sha256, scopes (recommend, budget, metrics, admin)"),
    ] = ()
    allow_anonymous: Annotated[bool, Field(description="bind beyond loopback without any key")] = False
    tls_certificate: Annotated[Path | None, Field(description="PEM certificate chain")] = None
    tls_key: Annotated[Path | None, Field(description="PEM private key")] = None
    threads: Annotated[PositiveInt, Field(description="threads of a matrix product")] = 1
    approximate_from: Annotated[
        int | None,
        Field(
            ge=1, description="items from which a two-tower model is searched by an approximate index; null for never"
        ),
    ] = 200_000
    retrievers: Annotated[
        dict[str, str],
        Field(description="model -> two-tower model, both served, whose best items it ranks: for large catalogues"),
    ] = {}
    retrieved_items: Annotated[
        int, Field(ge=1, le=1000, description="items that a retriever finds; a ranking holds no more than these")
    ] = 1000
    rank_whole_up_to: Annotated[
        PositiveInt, Field(description="items up to which a DLRM ranks the whole catalogue")
    ] = 20_000
    max_body_bytes: Annotated[PositiveInt, Field(description="largest request body")] = 2**20
    max_head_bytes: Annotated[PositiveInt, Field(description="largest head of a request: its path and headers")] = 2**16
    max_concurrent: Annotated[PositiveInt, Field(description="requests at once; more are told 429, Retry-After")] = 512
    max_concurrent_per_client: Annotated[
        PositiveInt, Field(description="as many of one key, or of one address where there are no keys")
    ] = 256
    max_connections: Annotated[
        PositiveInt,
        Field(description="connections at once, as open files allow; more may ask for health only"),
    ] = 1024
    max_connections_per_address: Annotated[
        PositiveInt | None, Field(description="as many of one address; null for half of max_connections")
    ] = None
    max_unsent_bytes: Annotated[
        PositiveInt, Field(description="bytes of answers waiting for slow readers, from which on more are told 429")
    ] = 2**26
    write_timeout_s: Annotated[PositiveFloat, Field(description="seconds that an answer may stay unread")] = 20
    linger_timeout_s: Annotated[
        PositiveFloat,
        Field(description="seconds that the rest of a body may take after its answer, or an answer before a close"),
    ] = 3
    idle_timeout_s: Annotated[
        PositiveFloat,
        Field(description="seconds that a connection may wait for its next request; more than a load balancer's"),
    ] = 5
    allowed_hosts: Annotated[
        tuple[str, ...],
        Field(description="names beside the loopback's that browsers may reach a keyless loopback service by"),
    ] = ()
    request_timeout_s: Annotated[
        PositiveFloat,
        Field(description="seconds a request may take, its body included, once its head came, which may take as long"),
    ] = 10
    drain_s: Annotated[PositiveInt, Field(description="seconds that requests under way have after that")] = 20
    drain_delay_s: Annotated[
        float, Field(ge=0, description="seconds from SIGTERM, when /readyz turns 503, to not accepting any more")
    ] = 5
    poll_s: Annotated[PositiveFloat, Field(description="seconds between looks for a new version of a bundle")] = 2
    cache_entries: Annotated[int, Field(ge=0, description="answers kept per model version; 0 keeps none")] = 4096
    cache_bytes: Annotated[int, Field(ge=0, description="bytes that they and the requests they answer may take")] = (
        2**26
    )
    image_attribute: Annotated[
        str | None,
        Field(
            description="item attribute with a picture for the page: a data: address, a path of the same site, or an "
            "address of image_origins; null for no pictures"
        ),
    ] = "image"
    image_origins: Annotated[
        tuple[Annotated[str, Field(pattern=r"^https?://[\w.-]+(:\d+)?$")], ...],
        Field(description="other sites that pages may load pictures from; they can see which are looked at"),
    ] = ()
    epsilon_warning: Annotated[
        PositiveFloat, Field(description="epsilon per person above which the page shows a warning")
    ] = 10
    access_log: Annotated[bool, Field(description="one log line a request (never with ids of users or items)")] = True
    tracing: Annotated[
        bool, Field(description="OpenTelemetry spans, sent where OTEL_EXPORTER_OTLP_ENDPOINT says (extra: otel)")
    ] = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="least level logged")] = "info"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key are given together or not at all")
        if self.require_signature and not (self.verify and self.copy_bundles):
            raise ValueError(
                "require_signature needs verify and copy_bundles: else files may differ from what was signed"
            )
        digests = [key.sha256 for key in self.api_keys]
        if len(set(digests)) < len(digests):
            raise ValueError("api_keys: one key is listed twice")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Options, environment, file."""
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)

    @property
    def is_keyless_loopback(self) -> bool:
        """Whether nothing but being on this machine opens the service."""
        return not self.api_keys and _is_loopback(self.host)

    def refuse_open_address(self) -> None:
        """Raise where the address can be reached from elsewhere and no key guards it.

        Raises:
            InputError: the host is not loopback, there are no keys, and that was not asked for.
        """
        if self.api_keys or self.allow_anonymous or _is_loopback(self.host):
            return
        raise InputError(
            f"host {self.host} can be reached from other machines and no API key is set: "
            "set api_keys (see `lazydp serve --make-key`), or say --allow-anonymous"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_settings(config: Path | None = None, **options: object) -> Settings:
    """Settings from options, environment and file.

    Raises:
        InputError: the file is missing or a setting is not valid; one line that names it.
    """
    if config is not None and not config.is_file():
        raise InputError(f"no configuration at {config}: expected a YAML file of settings of `lazydp serve`")

    class FromFile(Settings):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        return FromFile(**options)  # type: ignore[arg-type]  # validated by pydantic
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        raise InputError(f"setting {where}: {problem['msg'].removeprefix('Value error, ')}") from None
