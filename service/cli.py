"""The command `lazydp serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lazydp.components.shared.ledger_url import ledger_option


class _ServeCommand(click.Command):
    """Lists every setting below the options."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        formatter.write_paragraph()
        from lazydp.service.settings import Settings

        rows = [
            (name, (field.description or "") + _default(field.default)) for name, field in Settings.model_fields.items()
        ]
        with formatter.section("Settings: LAZYDP_SERVE_<NAME> in the environment, or <name> in the file of --config"):
            formatter.write_dl(rows)


def _default(value: object) -> str:
    """What a setting is where nobody chose; nothing where that means none."""
    if value in (None, (), {}):
        return ""
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"


@click.command(
    "serve",
    cls=_ServeCommand,
    epilog="Example: lazydp serve --bundle out/bundle --ledger sqlite:///ledger.db --port 8000",
)
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Bundle folder; may be given several times.",
)
@click.option("--name", help="Further name of the default model, such as that of a KServe InferenceService.")
@click.option("--repository", type=click.Path(path_type=Path), help="Folder of bundles that may be loaded by name.")
@ledger_option("URL of the ledger, for the budget; else the statement alone.")
@click.option("--host", help="Address to bind; 127.0.0.1 if left out.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to bind; 8000 if left out, 0 for a free one.")
@click.option("--port-file", type=click.Path(path_type=Path), help="File to write the port to once ready.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option("--allow-test-key", is_flag=True, default=None, help="Serve bundles made under a noise key for tests.")
@click.option("--allow-non-private", is_flag=True, default=None, help="Serve bundles trained without privacy.")
@click.option(
    "--require-signature",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Serve only bundles signed by this Ed25519 public key, a PEM file; may be given several times.",
)
@click.option("--allow-anonymous", is_flag=True, default=None, help="Bind beyond loopback without any API key.")
@click.option(
    "--make-key",
    metavar="NAME:SCOPES",
    help="Print a fresh API key (scopes as recommend,budget,metrics,admin) and leave.",
)
def command(config: Path | None, make_key: str | None, **options: Any) -> None:
    """Answer recommendation queries over REST, with the privacy statement of the model and the budget of its data."""
    if make_key is not None:
        _print_key(make_key)
        return
    from lazydp.components.shared.errors import InputError
    from lazydp.service.server import serve
    from lazydp.service.settings import load_settings

    given = {name: value for name, value in options.items() if value not in (None, ())}
    settings = load_settings(config, **given)
    if not settings.bundles and not settings.named_bundles:
        raise InputError("no bundle to serve: give --bundle DIR (or LAZYDP_SERVE_BUNDLES, or bundles in --config)")
    serve(settings)


def _print_key(name_and_scopes: str) -> None:
    from lazydp.service.http.auth import make_key
    from lazydp.service.settings import ApiKey

    name, _, scopes = name_and_scopes.partition(":")
    key, digest = make_key()
    try:
        entry = ApiKey.model_validate({"name": name, "sha256": digest, "scopes": scopes.split(",")})
    except ValueError:
        raise click.BadParameter(
            "expected NAME:SCOPES, such as web:recommend,budget", param_hint="--make-key"
        ) from None
    click.echo(f"key (shown once, give it to the client): {key}")
    click.echo(f"for api_keys of the service:             {entry.model_dump_json()}")
