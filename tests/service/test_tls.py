"""TLS by configuration: who knows the certificate is answered, and nobody is answered without TLS."""

import datetime
import signal
import ssl
from pathlib import Path

import httpx
import pytest

from support import forks
from support.service_load import eventually

x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate that localhost signed for itself, and its key."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    paths = tmp_path / "tls.crt", tmp_path / "tls.key"
    paths[0].write_bytes(signed.public_bytes(pem))
    paths[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return paths


def command(bundle: Path, tmp_path: Path, certificate: Path, key: Path) -> list[str]:
    config = tmp_path / "serve.yaml"
    config.write_text(
        f"tls_certificate: {certificate}\ntls_key: {key}\nallow_test_key: true\nport: 0\ndrain_delay_s: 0\n"
    )
    options = ["--bundle", str(bundle), "--config", str(config), "--port-file", str(tmp_path / "port")]
    return ["serve", *options]


def test_the_service_speaks_tls_and_nothing_else(
    bundles: dict[str, Path], tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    announced = tmp_path / "announced"
    process = forks.Fork(
        forks.LAZYDP, *command(bundles["towers"], tmp_path, *certificate), output=(announced, forks.NOWHERE)
    )
    try:
        eventually(lambda: process.poll() is not None or (tmp_path / "port").exists())
        port = int((tmp_path / "port").read_text())
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trusting) as client:
            assert len(client.get("/v1/users/7/recommendations").json()["items"]) == 10
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"https://localhost:{port}/healthz", verify=ssl.create_default_context())
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/healthz")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert f"https://127.0.0.1:{port}" in announced.read_text()


def test_files_that_are_no_certificate_are_one_line(bundles: dict[str, Path], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for certificate in (nothing, tmp_path / "missing.pem"):
        done = forks.run(forks.LAZYDP, *command(bundles["towers"], tmp_path, certificate, nothing), folder=tmp_path)
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert len(lines) == 1
        assert certificate.name in lines[0]
