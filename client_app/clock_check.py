"""Checks this device's clock. Flower signs the time of every message, so a node with a wrong clock is refused."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from quickbloom.common.errors import JoinError
from quickbloom.common.flower import names, transport
from quickbloom.common.system.loopback import is_loopback

_REFUSED = "Invalid timestamp"
"""Answer of Flower's server to a message signed more than 5 s ahead of its clock or 5 min behind it."""


_AHEAD, _BEHIND = timedelta(seconds=6), timedelta(minutes=5)
"""The same limits where the server's time is known to the second."""


class ClockError(JoinError):
    """The clock of this device is wrong; the message says how that was noticed."""


def check_against_ca(ca: Path, now: datetime) -> None:
    """Raise ClockError if `now` is outside the validity of the CA."""
    certificate = x509.load_pem_x509_certificate(ca.read_bytes())
    made, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < made:
        raise ClockError(
            f"this device's clock says {now:%Y-%m-%d %H:%M} UTC, but the CA in '{ca}' was made on {made:%Y-%m-%d %H:%M} UTC: "
            "set the clock, such as by `timedatectl set-ntp true`"
        )
    if now > ends:
        raise ClockError(
            f"the CA in '{ca}' ended on {ends:%Y-%m-%d %H:%M} UTC, and this device's clock says {now:%Y-%m-%d %H:%M} UTC: "
            "ask for new secrets, or set the clock"
        )


def check_against_server(server: str, secrets: Path, now: datetime | None = None, speaks: str = transport.GRPC) -> None:
    """Send the server an empty request at the time `now` of this device's clock. Raises ClockError if it refuses the time.

    `speaks`: the server's transport. Other answers are ignored.
    """
    now = now or datetime.now(UTC)
    if speaks == transport.HTTP:
        theirs = transport.clock_of(server, secrets / "ca.crt")
        if theirs is not None and not -_BEHIND <= now - theirs <= _AHEAD:
            raise _wrong(server, now)
    else:
        with suppress(names.MissingNameError):  # without what Flower calls itself there is no check
            _check_by_grpc(server, secrets, now)


def _check_by_grpc(server: str, secrets: Path, now: datetime) -> None:
    import grpc

    of_public_key, of_time, of_signature = map(names.get, ("PUBLIC_KEY_HEADER", "TIMESTAMP_HEADER", "SIGNATURE_HEADER"))
    stub, request = names.get("FleetStub"), names.get("GetRunRequest")
    key = load_ssh_private_key((secrets / "node.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    time = now.isoformat()
    metadata = [
        (of_public_key, names.get("public_key_to_bytes")(key.public_key())),
        (of_time, time),
        (of_signature, names.get("sign_message")(key, time.encode("ascii"))),
    ]
    credentials = grpc.ssl_channel_credentials((secrets / "ca.crt").read_bytes())
    options = [("grpc.enable_http_proxy", 0)] if is_loopback(server) else []
    with grpc.secure_channel(server, credentials, options) as channel:
        try:
            stub(channel).GetRun(request(), metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.details() == _REFUSED:
                raise _wrong(server, now) from None


def _wrong(server: str, now: datetime) -> ClockError:
    return ClockError(
        f"this device's clock says {now:%Y-%m-%d %H:%M:%S} UTC, which is more than 5 s ahead of the clock of "
        f"{server} or 5 min behind it: set it, such as by `timedatectl set-ntp true`"
    )
