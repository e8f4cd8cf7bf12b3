"""`lazydp sign`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="sign", epilog="Example: lazydp sign --bundle out/bundle --key sign.pem")
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="What `lazydp export` wrote.")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    envvar="LAZYDP_SIGN_KEY_FILE",
    required=True,
    help="File of an Ed25519 private key, PEM; its passphrase is in LAZYDP_SIGN_PASSPHRASE.",
)
def command(bundle: Path, key: Path) -> None:
    """Sign a bundle, so that `lazydp serve --require-signature` serves it.

    Every file of the bundle is compared with the manifest first. The signature is written into the bundle, as
    `bundle.sig`, instead of one that is there.
    """
    from lazydp.components.bundle import inventory
    from lazydp.components.bundle.manifest import BundleManifest
    from lazydp.components.bundle.signature import read_signing_key, sign

    private_key = read_signing_key(key)
    inventory.check(bundle, BundleManifest.load(bundle).files, digests=True)
    click.echo(f"bundle {bundle}: signed by key {sign(bundle, private_key)}")
