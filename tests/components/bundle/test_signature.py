"""Signatures of bundles: what a service that demands one refuses, and where the private key may lie."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from lazydp.components.bundle.cli import command
from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.signature import check_signature, read_public_key, read_signing_key, sign
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.shared.errors import InputError, LazyDPError, UnavailableError
from support.signing_keys import Keys, make_keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "bundle"
    write_untrained(folder, num_items=30, dim=8)
    sign(folder, read_signing_key(keys.private))
    return folder


@pytest.fixture
def bundle(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "bundle"))


def edited(member: str, value: object) -> Callable[[Path, Keys], None]:
    def change(folder: Path, _: Keys) -> None:
        path = folder / "bundle.sig"
        path.write_text(json.dumps({**json.loads(path.read_text()), member: value}))

    return change


def with_space(folder: Path, _: Keys) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text() + " ")


def of_another_bundle(folder: Path, keys: Keys) -> None:
    write_untrained(folder.with_name("another"), num_items=30, dim=8, seed=7)
    sign(folder.with_name("another"), read_signing_key(keys.private))
    shutil.copy(folder.with_name("another") / "bundle.sig", folder)


def of_the_digest_alone(folder: Path, keys: Keys) -> None:
    """Signed without the prefix, as the key might have been used elsewhere."""
    import base64
    import hashlib

    made = read_signing_key(keys.private).sign(hashlib.sha256((folder / "manifest.json").read_bytes()).digest())
    edited("signature", base64.b64encode(made).decode())(folder, keys)


def linked(folder: Path, _: Keys) -> None:
    (folder / "bundle.sig").rename(folder.with_name("elsewhere.sig"))
    (folder / "bundle.sig").symlink_to(folder.with_name("elsewhere.sig"))


def piped(name: str) -> Callable[[Path, Keys], None]:
    def change(folder: Path, _: Keys) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


FORGERIES: dict[str, tuple[Callable[[Path, Keys], object], str]] = {
    "no signature": (lambda folder, _: (folder / "bundle.sig").unlink(), "is not signed"),
    "another key": (lambda folder, keys: sign(folder, read_signing_key(keys.other)), "is signed by key"),
    "another key, under the name of this one": (
        lambda folder, keys: edited("signature", _signature_by(folder, keys.other))(folder, keys),
        "is not the signature",
    ),
    "a changed manifest": (with_space, "is not the signature"),
    "the signature of another bundle": (of_another_bundle, "is not the signature"),
    "a signature of something else": (of_the_digest_alone, "is not the signature"),
    "no base64": (edited("signature", "?" * 88), "is not the signature"),
    "a short signature": (edited("signature", "AAAA"), "is not the signature"),
    "another algorithm": (edited("algorithm", "none"), "algorithm"),
    "a member more": (edited("valid", True), "valid"),
    "a newer format": (edited("format_version", 2), "use a newer lazydp"),
    "no JSON": (lambda folder, _: (folder / "bundle.sig").write_text("x"), "cannot be read as JSON"),
    "large": (lambda folder, _: (folder / "bundle.sig").write_text("x" * 5000), "larger than"),
    "a link": (linked, "symbolic link"),
    "a pipe": (piped("bundle.sig"), "not a plain file"),
    "a manifest that is a pipe": (piped("manifest.json"), "not a plain file"),
    "no manifest": (lambda folder, _: (folder / "manifest.json").unlink(), "no bundle at"),
}


def _signature_by(folder: Path, key: Path) -> str:
    copy = folder.with_name("signed-by-another")
    shutil.copytree(folder, copy)
    sign(copy, read_signing_key(key))
    return str(json.loads((copy / "bundle.sig").read_text())["signature"])


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forgery_is_refused_in_one_line(case: str, bundle: Path, keys: Keys) -> None:
    forge, says = FORGERIES[case]
    forge(bundle, keys)
    with pytest.raises(LazyDPError, match=says) as refused:
        Bundle.open(bundle, allow_test_key=True, signed_by=[read_public_key(keys.public)])
    assert "\n" not in str(refused.value)


def test_a_file_that_differs_from_the_signed_manifest(bundle: Path, keys: Keys) -> None:
    path = bundle / "dense.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LazyDPError, match="is corrupted"):
        Bundle.open(bundle, allow_test_key=True, signed_by=[read_public_key(keys.public)])


def test_one_of_several_keys_is_enough_and_without_keys_nothing_is_asked_for(signed: Path, keys: Keys) -> None:
    both = [read_public_key(keys.other_public), read_public_key(keys.public)]
    assert Bundle.open(signed, allow_test_key=True, signed_by=both).manifest == BundleManifest.load(signed)
    assert Bundle.open(signed, allow_test_key=True).manifest == BundleManifest.load(signed)


def test_the_command_signs_what_is_whole(bundle: Path, keys: Keys) -> None:
    (bundle / "bundle.sig").unlink()
    done = CliRunner().invoke(command, ["--bundle", str(bundle)], env={"LAZYDP_SIGN_KEY_FILE": str(keys.private)})
    assert "signed by key" in done.output
    check_signature(bundle, [read_public_key(keys.public)])
    (bundle / "dense.safetensors").write_bytes(b"")
    done = CliRunner().invoke(command, ["--bundle", str(bundle), "--key", str(keys.private)])
    assert isinstance(done.exception, LazyDPError)


def test_a_key_with_a_passphrase(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYDP_SIGN_PASSPHRASE", "correct horse")
    assert read_signing_key(keys.encrypted)
    monkeypatch.setenv("LAZYDP_SIGN_PASSPHRASE", "battery staple")
    with pytest.raises(InputError, match="LAZYDP_SIGN_PASSPHRASE") as refused:
        read_signing_key(keys.encrypted)
    assert "battery" not in str(refused.value)


def test_keys_that_are_none(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_signing_key(tmp_path / "none")
    no_key = tmp_path / "no-key.pem"
    no_key.touch(mode=0o600)
    with pytest.raises(InputError, match="cannot be read"):
        read_signing_key(no_key)
    with pytest.raises(InputError, match="cannot be read"):
        read_public_key(keys.private)
    with pytest.raises(InputError, match="another algorithm"):
        read_signing_key(keys.elliptic)
    with pytest.raises(InputError, match="another algorithm"):
        read_public_key(keys.elliptic_public)
    open_to_all = tmp_path / "open.pem"
    shutil.copy(keys.private, open_to_all)
    open_to_all.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        read_signing_key(open_to_all)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(UnavailableError, match=r"lazydp\[signing\]"):
        read_public_key(keys.public)
