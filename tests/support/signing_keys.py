"""Key pairs to sign bundles with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

PASSPHRASE = "correct horse"


@dataclass(frozen=True)
class Keys:
    """PEM files: a key pair, another one, the first one's key under `PASSPHRASE`, and a pair of another algorithm."""

    private: Path
    public: Path
    other: Path
    other_public: Path
    encrypted: Path
    elliptic: Path
    elliptic_public: Path


def make_keys(folder: Path) -> Keys:
    """Make fresh keys in `folder`."""
    first, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    elliptic = ec.generate_private_key(ec.SECP256R1())
    return Keys(
        private=_private(folder / "sign.pem", first),
        public=_public(folder / "sign.pub.pem", first),
        other=_private(folder / "other.pem", other),
        other_public=_public(folder / "other.pub.pem", other),
        encrypted=_private(folder / "encrypted.pem", first, passphrase=PASSPHRASE),
        elliptic=_private(folder / "elliptic.pem", elliptic),
        elliptic_public=_public(folder / "elliptic.pub.pem", elliptic),
    )


_Key = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def _private(path: Path, key: _Key, *, passphrase: str | None = None) -> Path:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    path.touch(mode=0o600)
    path.write_bytes(pem)
    return path


def _public(path: Path, key: _Key) -> Path:
    public = key.public_key()
    path.write_bytes(public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path
