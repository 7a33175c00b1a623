"""Lets a SuperLink take up a new server certificate while it runs: once its files hold one, new connections see it.

Nothing of Flower is replaced. gRPC asks for the certificate at every connection if its credentials are dynamic ones; TLS of
Python lets a server choose its context once the client has said hello. Connections that exist go on.
"""

import ssl
import threading
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any

Signature = tuple[tuple[int, int, int], ...]


class Pair:
    """The files of a certificate and its key. Two that do not belong together, as while they are replaced, are passed over."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises OSError or ssl.SSLError if the two cannot be used now."""
        self.certificate, self._key = certificate, key
        self._changing = threading.Lock()
        self._seen = self._signature()
        self._take_up(self._seen)

    def current(self) -> tuple[bytes, bytes, ssl.SSLContext]:
        """Return (key, certificate, context) of the newest pair that can be used. Key and certificate are PEM."""
        with self._changing:
            try:
                if (now := self._signature()) != self._seen:
                    self._take_up(now)
                    text = "The server certificate '%s' is new: connections see it from now on"
                    getLogger("flwr").log(INFO, text, self.certificate)
            except (OSError, ssl.SSLError):
                pass  # looked at again by the next connection
            return self._pair

    def _take_up(self, signature: Signature) -> None:
        key, certificate = self._key.read_bytes(), self.certificate.read_bytes()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self._key)  # refuses a key of another certificate
        if self._signature() != signature:
            raise OSError("changed while it was read")
        self._pair, self._seen = (key, certificate, context), signature

    def _signature(self) -> Signature:
        found = [path.stat() for path in (self.certificate, self._key)]
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)


def take_up(certificate: Path, key: Path) -> Pair | None:
    """Let servers of gRPC and uvicorn here show the newest certificate of these files; None if they cannot be used now."""
    try:
        pair = Pair(certificate, key)
    except (OSError, ssl.SSLError) as error:
        getLogger("flwr").log(WARNING, "The server certificate '%s' cannot be read (%s)", certificate, error)
        return None  # Flower says what is wrong, in its own words
    _for_grpc(pair)
    _for_uvicorn(pair)
    return pair


def _for_grpc(pair: Pair) -> None:
    import grpc

    static = grpc.ssl_server_credentials

    def credentials(pairs: Any, root_certificates: bytes | None = None, require_client_auth: bool = False) -> Any:
        """As gRPC's, but with the newest certificate at each connection; any other certificate than this one as before."""
        first = pair.current()[:2]
        if [tuple(one) for one in pairs] != [first]:
            return static(pairs, root_certificates, require_client_auth)
        shown = first

        def configuration(of: tuple[bytes, bytes]) -> Any:
            return grpc.ssl_server_certificate_configuration([of], root_certificates)

        def newest() -> Any:
            nonlocal shown
            if (found := pair.current()[:2]) == shown:
                return None  # the same as before
            shown = found
            return configuration(found)

        return grpc.dynamic_ssl_server_credentials(configuration(first), newest, require_client_auth)

    grpc.ssl_server_credentials = credentials


def _for_uvicorn(pair: Pair) -> None:
    import uvicorn

    load = uvicorn.Config.load

    def load_and_follow(self: Any) -> None:
        """As uvicorn's; a connection gets the context of the newest certificate."""
        load(self)
        if self.ssl is None or Path(self.ssl_certfile) != pair.certificate:
            return
        ours: ssl.SSLContext = self.ssl

        def choose(connection: Any, name: str | None, context: ssl.SSLContext) -> None:
            newest = pair.current()[2]
            newest.verify_mode = ours.verify_mode
            connection.context = newest

        ours.sni_callback = choose

    uvicorn.Config.load = load_and_follow  # type: ignore[method-assign]
