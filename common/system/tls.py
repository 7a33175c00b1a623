"""TLS between devices and the server: why a certificate is not trusted, and when one ends, told a month ahead."""

import socket
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

SOON = timedelta(days=30)
"""How long before its end a certificate should be renewed."""
DAY = 86_400.0
"""Seconds between two reminders."""


def distrust(server: str, error: ssl.SSLCertVerificationError, ca: Path) -> str:
    """Return one sentence that says why a server's certificate is not trusted.

    `server`: "HOST:PORT"; `ca`: file of the CA that should vouch for it.
    """
    reason = error.verify_message
    if "expired" in reason:
        return f"the certificate of {server} has expired: renew it there with `quickbloom secrets --renew-server`"
    if "not yet valid" in reason:
        return f"the certificate of {server} is not valid yet: set this machine's clock"
    if "match" in reason:  # hostname mismatch, IP address mismatch
        mend = "renew it there with `quickbloom secrets --renew-server --host NAME`"
        return f"the certificate of {server} is for other names: {mend}"
    return f"the certificate of {server} was not made by the CA in '{ca}' ({reason}): copy this federation's ca.crt here"


def end_of(pem: bytes) -> datetime:
    """Return when the first certificate of a PEM file ends. Raises ValueError."""
    from cryptography import x509  # takes a moment

    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def served(host: str, port: int, timeout: float = 5.0) -> bytes:
    """Return the certificate that a server shows, as PEM, whoever signed it. Raises OSError.

    No name is asked for, and the newest protocols are offered, as a node does.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection((host, port), timeout=timeout) as raw, context.wrap_socket(raw, server_hostname=host) as met:
        shown = met.getpeercert(binary_form=True)
    if shown is None:
        raise ssl.SSLError(f"{host}:{port} shows no certificate")
    return ssl.DER_cert_to_PEM_cert(shown).encode()


def soon(what: str, end: datetime, mend: str, now: datetime | None = None) -> str:
    """Return a sentence if a certificate ends within SOON, or has ended; else "".

    `what`: "the certificate of fl.example.org:9092"; `mend`: what to do; `now`: with a time zone, by default the present.
    """
    left = end - (now or datetime.now(UTC))
    if left > SOON:
        return ""
    date = end.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    if left <= timedelta():
        return f"{what} has ended, at {date}: {mend}"
    days, hours = left.days, left.seconds // 3600
    within = f"{days} days" if days > 1 else f"{24 * days + hours} hours"
    return f"{what} ends at {date}, in {within}: {mend}"


def remind(look: Callable[[], str], say: Callable[[str], object], pause: float = DAY) -> None:
    """Say what `look` finds, now and every `pause` seconds, in a thread of its own that ends with the process.

    `look` returns a sentence, or "". What cannot be seen (OSError, ValueError) is no reason to say anything.
    """
    waiting = threading.Event()

    def again() -> None:
        while True:
            try:
                sentence = look()
            except (OSError, ValueError):
                sentence = ""
            if sentence:
                say(sentence)
            waiting.wait(pause)

    threading.Thread(target=again, daemon=True, name="certificates").start()
