"""A signature beside a bundle: whoever holds the public key can tell who released it.

The file `bundle.sig` signs the SHA-256 of the manifest by Ed25519 (RFC 8032), after a prefix that no other use of the
key has. The manifest holds the SHA-256 of every other file, so one signature covers the whole bundle.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field

from lazydp.components.bundle.manifest import FILE_NAME, MAX_BYTES, MAX_SIGNATURE_BYTES, SIGNATURE_FILE, plain_file
from lazydp.components.shared.errors import FormatError, InputError, IntegrityError, UnavailableError
from lazydp.components.shared.files import read_json, sha256_file, write_json
from lazydp.components.shared.frozen_model import FrozenModel
from lazydp.components.shared.secrecy import forbid_core_dumps
from lazydp.components.shared.validation import Document

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT_VERSION = 1
KEY_VARIABLE = "LAZYDP_SIGN_KEY_FILE"
PASSPHRASE_VARIABLE = "LAZYDP_SIGN_PASSPHRASE"  # noqa: S105 - a name
_PREFIX = b"lazydp bundle signature 1\0"
_READABLE_BY_OTHERS = 0o007


class Signature(FrozenModel):
    """The content of `bundle.sig`.

    Attributes:
        algorithm: Ed25519.
        key: fingerprint of the public key, so that an error can name it.
        signature: base64 of the 64 bytes.
    """

    algorithm: Literal["ed25519"] = "ed25519"
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    signature: Annotated[str, Field(max_length=100)]


def key_file_of_environment() -> Path | None:
    """The file of the signing key that `LAZYDP_SIGN_KEY_FILE` names."""
    named = os.environ.get(KEY_VARIABLE, "").strip()
    return Path(named) if named else None


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key in PEM; its passphrase, if it has one, is in `LAZYDP_SIGN_PASSPHRASE`.

    Raises:
        InputError: no such file, not such a key, a wrong passphrase, or a file that others may read.
        UnavailableError: the package cryptography is not installed.
    """
    ed25519, serialization = _library()
    forbid_core_dumps()
    pem = _read(path, "signing key")
    if path.stat().st_mode & _READABLE_BY_OTHERS:
        raise InputError(f"signing key {path} may be read by others: run `chmod 600` on it")
    passphrase = os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except Exception as error:  # the library raises several kinds, and its own messages may quote the file
        raise InputError(
            f"signing key {path} cannot be read as a PEM private key: expected what `openssl genpkey -algorithm "
            f"ed25519` writes, with its passphrase, if it has one, in {PASSPHRASE_VARIABLE}"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"signing key {path} is of another algorithm: expected Ed25519")
    return cast("Ed25519PrivateKey", key)


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read an Ed25519 public key in PEM.

    Raises:
        InputError: no such file, or not such a key.
        UnavailableError: the package cryptography is not installed.
    """
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_public_key(_read(path, "public key"))
    except ValueError as error:
        raise InputError(f"public key {path} cannot be read: expected PEM, as `openssl pkey -pubout` writes") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"public key {path} is of another algorithm: expected Ed25519")
    return cast("Ed25519PublicKey", key)


def fingerprint(key: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the key's 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(folder: Path, key: Ed25519PrivateKey) -> str:
    """Write `folder`/bundle.sig, instead of one that is there; returns the fingerprint of the public key.

    Raises:
        FormatError: the folder has no manifest.
    """
    made = key.sign(_message(folder))
    signature = Signature(key=fingerprint(key.public_key()), signature=base64.b64encode(made).decode())
    write_json(folder / SIGNATURE_FILE, signature.model_dump(), format_version=FORMAT_VERSION)
    return signature.key


def check_signature(folder: Path, keys: Sequence[Ed25519PublicKey]) -> None:
    """Refuse a bundle that none of `keys` signed as its manifest is now. Nothing of the manifest is parsed.

    Raises:
        IntegrityError: no signature, one by another key, or one of another manifest.
        FormatError: the signature is not well-formed, or the bundle has no manifest.
    """
    known = {fingerprint(key): key for key in keys}
    message = _message(folder)
    found = _load(folder)
    if found.key not in known:
        raise IntegrityError(
            f"bundle {folder} is signed by key {found.key}, expected one of {', '.join(sorted(known))}: "
            "have it signed by one of these, or add its key to require_signature"
        )
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra; it is there, it read the keys

    try:
        known[found.key].verify(base64.b64decode(found.signature, validate=True), message)
    except (InvalidSignature, binascii.Error):
        raise IntegrityError(
            f"bundle {folder}: {SIGNATURE_FILE} is not the signature of this {FILE_NAME}: copy the bundle again, "
            "or do not trust it"
        ) from None


def _load(folder: Path) -> Signature:
    path = folder / SIGNATURE_FILE
    if not path.exists() and not path.is_symlink():
        raise IntegrityError(
            f"bundle {folder} is not signed, and a signature is required: "
            f"run `lazydp sign --bundle {folder} --key FILE`"
        )
    plain_file(path, what="signature", max_bytes=MAX_SIGNATURE_BYTES)
    where = f"signature {path}"
    document = read_json(path, format_version=FORMAT_VERSION, what="signature")
    return Document(where, document).validated(Signature, raises=FormatError)


def _message(folder: Path) -> bytes:
    manifest = plain_file(folder / FILE_NAME, what="bundle manifest", max_bytes=MAX_BYTES)
    try:
        return _PREFIX + bytes.fromhex(sha256_file(manifest))
    except FileNotFoundError:
        raise FormatError(f"no bundle at {folder}: it holds no {FILE_NAME}") from None


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None


def _library() -> tuple[Any, Any]:
    """What `cryptography` has of Ed25519, and of files of keys: an extra."""
    try:
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415 - an extra
    except ImportError:
        raise UnavailableError("signatures need the package cryptography: pip install 'lazydp[signing]'") from None
    return ed25519, serialization
