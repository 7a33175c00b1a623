"""X.509 certificates for a federation: a CA, the SuperLink's certificate, and one sentence for any mistake in them.

All keys are EC P-384: the curve that Flower recommends for its nodes, and that gRPC and OpenSSL
accept for TLS.
"""

import ipaddress
import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from quickbloom.common.errors import ConfigError, QuickbloomError

CA_DAYS = 3650
ALWAYS = ("localhost", "127.0.0.1")
"""Host names of every server certificate, at which health checks ask."""
_SKEW = timedelta(hours=1)  # a device whose clock is late by less than this accepts a new certificate at once
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


class CertificateError(QuickbloomError):
    """A certificate or a key is missing, unreadable, expired, or belongs to another one."""


class _HasPublicKey(Protocol):
    def public_key(self) -> object: ...


def parse_host(text: str) -> str:
    """Return a DNS name in lower case, or an IP address. Raises ConfigError for anything else, such as `host:port`."""
    host = text.strip().lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    # A last part of digits is a mistyped address: no such top-level domain exists.
    if len(host) > 253 or labels[-1].isdigit() or not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(
            "`--host` must be a DNS name or an IP address, without scheme, port or wildcard, such as fl.example.org or "
            f"203.0.113.5, got '{text}'"
        )
    return host


def all_hosts(hosts: Iterable[str]) -> list[str]:
    """Return `hosts` and those of ALWAYS, checked, each once."""
    return list(dict.fromkeys(parse_host(host) for host in (*hosts, *ALWAYS)))


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the DNS names and IP addresses of a certificate; empty if it has none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def make_ca(now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Return a new CA: its key, and its certificate for CA_DAYS days."""
    key = ec.generate_private_key(ec.SECP384R1())
    # With its own name, so that no program confuses the CAs of two federations.
    name = _name(f"quickbloom CA {secrets.token_hex(4)}")
    builder = _builder(name, name, key.public_key(), now, now + timedelta(days=CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    return key, builder.sign(key, SHA384())


def issue(
    ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, hosts: Iterable[str], days: int, now: datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Return a new key and certificate for a server with the names `hosts` and those of ALWAYS.

    `days`: its validity, which ends with the CA's at the latest.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    end = min(now + timedelta(days=days), ca.not_valid_after_utc)
    builder = _builder(_name("quickbloom SuperLink"), ca.subject, key.public_key(), now, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    names = x509.SubjectAlternativeName([_general_name(host) for host in all_hosts(hosts)])
    builder = builder.add_extension(names, critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    return key, builder.sign(ca_key, SHA384())


def node_key() -> tuple[bytes, bytes]:
    """Return (private, public) of a new node, both in OpenSSH's format: Flower refuses a public key as PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def pem(thing: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    """Return a certificate or an unencrypted private key (PKCS 8) as PEM."""
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(Encoding.PEM)
    return thing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_certificate(path: Path) -> x509.Certificate:
    """Return the first certificate of a PEM file. Raises CertificateError."""
    try:
        return x509.load_pem_x509_certificate(_read(path, "certificate"))
    except ValueError:
        raise CertificateError(f"the certificate '{path}' is not a PEM file with an X.509 certificate: restore it") from None


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the EC key of a PEM file. Raises CertificateError, also for a key of another kind or with a passphrase."""
    try:
        key = load_pem_private_key(_read(path, "key"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(
            f"the key '{path}' is not a PEM file with a private key without passphrase: restore it"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"the key '{path}' must be an elliptic curve key, as `quickbloom secrets` makes it")
    return key


def check_certificate(certificate: Path, ca: Path, key: Path | None = None, now: datetime | None = None) -> str:
    """Return what is wrong with a server certificate, in one sentence; "" if nothing is.

    Checks that both certificates can be read and are valid at `now` (with a time zone; by default
    the present), that `ca` signed `certificate`, and, if a `key` is given, that it belongs to the
    certificate.
    """
    now = now or datetime.now(UTC)
    try:
        authority = load_certificate(ca)
        _check_dates(authority, ca, now, "make new secrets for the whole federation with `quickbloom secrets`")
        server = load_certificate(certificate)
        _check_dates(server, certificate, now, "renew it with `quickbloom secrets --renew-server`")
        try:
            server.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise CertificateError(
                f"the certificate '{certificate}' is not signed by the CA '{ca}': use the files that `quickbloom secrets` "
                "made together, or renew the certificate with `--renew-server`"
            ) from None
        if key is not None and not same_key(load_key(key), server):
            raise CertificateError(
                f"the key '{key}' does not belong to the certificate '{certificate}': "
                "renew both with `quickbloom secrets --renew-server`"
            )
    except CertificateError as error:
        return str(error)
    return ""


def same_key(one: _HasPublicKey, other: _HasPublicKey) -> bool:
    """Return whether a private key and a certificate, or any two of them, have the same public key."""
    return one.public_key() == other.public_key()


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(f"the {what} '{path}' is missing: make it with `quickbloom secrets`, or copy it here") from None
    except OSError as error:
        raise CertificateError(
            f"the {what} '{path}' cannot be read ({error.strerror}): it must be a file that this user may read"
        ) from None


def _check_dates(certificate: x509.Certificate, path: Path, now: datetime, remedy: str) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise CertificateError(f"the certificate '{path}' expired at {_date(end)}, and it is {_date(now)}: {remedy}")
    if now < start:
        raise CertificateError(
            f"the certificate '{path}' is not valid before {_date(start)}, and it is {_date(now)}: set this machine's clock"
        )


def _date(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - _SKEW).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
