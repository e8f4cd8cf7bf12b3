"""TLS by configuration: who knows the certificate is answered, and nobody is answered without TLS."""

import datetime
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

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
    config.write_text(f"tls_certificate: {certificate}\ntls_key: {key}\nallow_test_key: true\nport: 0\n")
    options = ["--bundle", str(bundle), "--config", str(config), "--port-file", str(tmp_path / "port")]
    return [sys.executable, "-m", "lazydp.pipelines.cli", "serve", *options]


def test_the_service_speaks_tls_and_nothing_else(
    bundles: dict[str, Path], tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    process = subprocess.Popen(
        command(bundles["towers"], tmp_path, *certificate), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "port").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        port = int((tmp_path / "port").read_text())
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trusting) as client:
            assert len(client.get("/v1/users/7/recommendations").json()["items"]) == 10
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"https://localhost:{port}/healthz", verify=ssl.create_default_context())
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/healthz")
    finally:
        process.terminate()
        announced, _ = process.communicate(timeout=60)
    assert f"https://127.0.0.1:{port}" in announced


def test_files_that_are_no_certificate_are_one_line(bundles: dict[str, Path], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for certificate in (nothing, tmp_path / "missing.pem"):
        done = subprocess.run(
            command(bundles["towers"], tmp_path, certificate, nothing),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert len(lines) == 1
        assert certificate.name in lines[0]
