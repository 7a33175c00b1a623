"""The CA and the server certificate, as OpenSSL and Python's TLS see them."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from programs import program

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.deployment.certificates import check_certificate, issue, make_ca, parse_host, pem

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def made(folder: Path, now: datetime = NOW, days: int = 30) -> tuple[Path, Path, Path]:
    """ca.crt, server.crt and server.key of a new CA in `folder`."""
    folder.mkdir(exist_ok=True)
    ca_key, ca = make_ca(now)
    key, certificate = issue(ca_key, ca, ["superlink", "FL.example.org", "203.0.113.5", "::1"], days, now)
    (folder / "ca.crt").write_bytes(pem(ca))
    (folder / "server.crt").write_bytes(pem(certificate))
    (folder / "server.key").write_bytes(pem(key))
    return folder / "ca.crt", folder / "server.crt", folder / "server.key"


def test_openssl_verifies_the_certificate_for_every_name_and_no_other(tmp_path: Path) -> None:
    ca, server, _ = made(tmp_path, datetime.now(UTC))
    verify = ("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", ca)
    for host in ("superlink", "fl.example.org", "localhost"):
        program("openssl", *verify, "-verify_hostname", host, server)
    for address in ("203.0.113.5", "127.0.0.1", "::1"):
        program("openssl", *verify, "-verify_ip", address, server)
    assert "hostname mismatch" in program("openssl", *verify, "-verify_hostname", "elsewhere.org", server, fails=True)


def test_openssl_reads_the_extensions_that_grpc_needs(tmp_path: Path) -> None:
    ca, server, _ = made(tmp_path)
    authority = program("openssl", "x509", "-in", ca, "-noout", "-text")
    assert "X509v3 Basic Constraints: critical\n                CA:TRUE" in authority
    assert "X509v3 Key Usage: critical\n                Certificate Sign, CRL Sign" in authority
    text = program("openssl", "x509", "-in", server, "-noout", "-text")
    assert "CA:FALSE" in text
    assert "TLS Web Server Authentication" in text
    assert "DNS:superlink, DNS:fl.example.org, IP Address:203.0.113.5, IP Address:0:0:0:0:0:0:0:1, DNS:localhost" in text
    assert "Not After : May 31 12:00:00 2026 GMT" in text


@pytest.mark.parametrize("host", ["superlink", "fl.example.org", "203.0.113.5", "::1", "localhost", "127.0.0.1"])
def test_a_client_that_trusts_the_ca_shakes_hands_under_every_name(tmp_path: Path, host: str) -> None:
    assert handshake(*made(tmp_path, datetime.now(UTC)), host) == "TLSv1.3"


def test_no_handshake_under_another_name_nor_with_another_ca(tmp_path: Path) -> None:
    ca, server, key = made(tmp_path / "one", datetime.now(UTC))
    other, _, _ = made(tmp_path / "two", datetime.now(UTC))
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'elsewhere'"):
        handshake(ca, server, key, "elsewhere")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer certificate"):
        handshake(other, server, key, "localhost")


def handshake(ca: Path, server: Path, key: Path, host: str) -> str | None:
    """The protocol that a TLS client and a TLS server on loopback agree upon, if the client calls it `host`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server, key)
    trusting = ssl.create_default_context(cafile=str(ca))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with context.wrap_socket(far, server_side=True) as accepted:
                accepted.recv(1)
        except (ssl.SSLError, OSError):
            far.close()  # the client has refused: it is asked for its reason

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with trusting.wrap_socket(near, server_hostname=host) as client:
            client.send(b"x")
            return client.version()
    finally:
        near.close()
        thread.join()


@pytest.mark.parametrize(
    "host",
    [
        "",
        "https://fl.example.org",
        "fl.example.org:9092",
        "a b",
        "*.example.org",
        "-a.org",
        "a..b",
        "300.1.2.3",
        "münchen.de",
        "a" * 64,
    ],
)
def test_a_bad_host_name_is_refused_in_one_sentence(host: str) -> None:
    with pytest.raises(ConfigError, match="`--host` must be a DNS name or an IP address, without scheme, port or wildcard"):
        parse_host(host)


def test_a_good_certificate_has_nothing_wrong(tmp_path: Path) -> None:
    ca, server, key = made(tmp_path)
    assert check_certificate(server, ca, key, NOW) == ""
    # The clock of a device may be late by less than an hour.
    assert check_certificate(server, ca, key, NOW - timedelta(minutes=59)) == ""


@pytest.mark.parametrize(
    ("days", "sentence"),
    [
        (-1, "server.crt' is not valid before 2026-05-01 11:00 UTC, and it is 2026-04-30 12:00 UTC: set this machine's clock"),
        (31, "server.crt' expired at 2026-05-31 12:00 UTC, and it is 2026-06-01 12:00 UTC: renew it with"),
        (3651, "ca.crt' expired at 2036-04-28 12:00 UTC, and it is 2036-04-29 12:00 UTC: make new secrets"),
    ],
)
def test_dates_are_told(tmp_path: Path, days: int, sentence: str) -> None:
    ca, server, _ = made(tmp_path)
    if days == -1:  # the CA is older than the certificate
        ca_key, old = make_ca(NOW - timedelta(days=9))
        ca.write_bytes(pem(old))
        server.write_bytes(pem(issue(ca_key, old, [], 30, NOW)[1]))
    assert sentence in check_certificate(server, ca, None, NOW + timedelta(days=days))


def test_a_certificate_ends_with_its_ca(tmp_path: Path) -> None:
    ca_key, ca = make_ca(NOW)
    _, certificate = issue(ca_key, ca, [], 3650, NOW + timedelta(days=10))
    assert certificate.not_valid_after_utc == ca.not_valid_after_utc == NOW + timedelta(days=3650)


def test_files_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    ca, server, key = made(tmp_path / "one")
    other_ca, _, other_key = made(tmp_path / "two")
    assert f"'{server}' is not signed by the CA '{other_ca}'" in check_certificate(server, other_ca, key, NOW)
    assert f"the key '{other_key}' does not belong to the certificate '{server}'" in check_certificate(
        server, ca, other_key, NOW
    )


def test_files_that_are_missing_or_something_else_are_told(tmp_path: Path) -> None:
    ca, server, key = made(tmp_path)
    noise = tmp_path / "noise"
    noise.write_text("no PEM")
    assert f"the certificate '{tmp_path / 'none'}' is missing" in check_certificate(tmp_path / "none", ca, key, NOW)
    assert f"the key '{tmp_path / 'none'}' is missing" in check_certificate(server, ca, tmp_path / "none", NOW)
    assert f"'{noise}' is not a PEM file with an X.509 certificate" in check_certificate(noise, ca, key, NOW)
    assert f"'{noise}' is not a PEM file with a private key" in check_certificate(server, ca, noise, NOW)
    assert f"'{tmp_path}' cannot be read (Is a directory)" in check_certificate(server, tmp_path, key, NOW)
