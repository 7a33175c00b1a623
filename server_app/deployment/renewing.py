"""The certificate of a federation in containers: when it ends, and a new one without a stop (`quickbloom deploy renew`)."""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime

from quickbloom.common.system import tls
from quickbloom.server_app.deployment.certificates import parse_host
from quickbloom.server_app.deployment.compose import Compose, ComposeError

RENEW = "`quickbloom deploy renew` makes a new one, and no run stops"
_END = "-----END CERTIFICATE-----"
# With what every image has: the certificate that nodes are shown, and that of its CA.
_LOOK = (
    "import ssl; c = ssl.create_default_context(); c.check_hostname, c.verify_mode = False, ssl.CERT_NONE; "
    "c.set_alpn_protocols(['h2', 'http/1.1']); import socket; "
    "s = c.wrap_socket(socket.create_connection(('superlink', {port}), timeout=5)); "
    "print(ssl.DER_cert_to_PEM_cert(s.getpeercert(True))); print(open('/secrets/ca.crt').read())"
)
_PORT = 9092
_PATIENCE = 30.0
"""Seconds that a SuperLink has to show a new certificate before it is restarted; the next connection should see it."""


def served(compose: Compose) -> tuple[bytes, bytes]:
    """Return the certificate that the SuperLink shows to nodes, and its CA's, as PEM. Raises ComposeError."""
    said = compose.run("exec", "-T", "superlink", "python", "-c", _LOOK.format(port=_PORT))
    found = [part.strip() + f"\n{_END}\n" for part in said.split(_END) if "BEGIN CERTIFICATE" in part]
    if len(found) != 2:
        raise ComposeError("the SuperLink does not show its certificate: `quickbloom deploy status` says whether it is up")
    return found[0].encode(), found[1].encode()


def told(compose: Compose) -> str:
    """Say how long the certificate lasts, in one sentence. Raises ComposeError."""
    shown, ca = served(compose)
    end = tls.end_of(shown)
    mend = "new secrets for the whole federation are needed by then, docs/deployment.md, new certificates"
    if ending := tls.soon("The CA's certificate", tls.end_of(ca), mend):
        return f"{ending}."
    if ending := tls.soon("The SuperLink's certificate", end, RENEW):
        return f"{ending}."
    return f"The SuperLink's certificate is valid until {_date(end)}."


def renew(compose: Compose, hosts: Sequence[str] = (), pause: float = 1.0) -> Iterator[str]:
    """Make a new certificate from the same CA, and have the SuperLink show it; yield what was done.

    `hosts`: its names; none: those of the old one. A SuperLink of a release that does not take it up by itself is restarted,
    which runs outlive. Raises ConfigError for a wrong name, ComposeError if Compose fails.
    """
    names = [part for host in hosts for part in ("--host", parse_host(host))]
    before, _ = served(compose)
    compose.run(
        "run",
        "--rm",
        "-T",
        "--no-deps",
        "secrets",
        "quickbloom",
        "secrets",
        "--output",
        "/vault/secrets",
        "--renew-server",
        *names,
    )
    compose.run("run", "--rm", "-T", "--no-deps", "secrets")
    yield "A new certificate was made from the same CA; nothing changes for the nodes."
    if _shown(compose, before, _PATIENCE, pause):
        how = "shows it, without a restart"
    else:
        compose.run("restart", "superlink")
        if not _shown(compose, before, 10 * _PATIENCE, pause):
            raise ComposeError("the SuperLink does not show the new certificate: `docker compose logs superlink` says why")
        how = "was restarted for it, which runs outlive"
    yield f"The SuperLink {how}: it is valid until {_date(tls.end_of(served(compose)[0]))}."


def _shown(compose: Compose, before: bytes, patience: float, pause: float) -> bool:
    """Wait until another certificate than `before` is shown; return whether it is."""
    deadline = time.monotonic() + patience
    while True:
        try:
            if served(compose)[0] != before:
                return True
        except ComposeError:
            pass  # it starts
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)


def _date(end: datetime) -> str:
    return f"{end:%Y-%m-%d}"
