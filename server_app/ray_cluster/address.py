"""Whether a Ray cluster answers at an address, found within seconds: Ray itself waits for minutes, deaf to Ctrl-C."""

import os
import socket
from importlib import import_module

import grpc

AUTO, CLIENT = "auto", "ray://"
_PATIENCE = 5.0
"""Seconds in which the address has to answer."""
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_NOT_RAY = {
    grpc.StatusCode.UNAVAILABLE: "it takes connections and does not speak Ray's protocol",
    grpc.StatusCode.DEADLINE_EXCEEDED: "it took a connection and said nothing",
    grpc.StatusCode.UNIMPLEMENTED: "it is a server of another kind",
}


def check_answers(address: str) -> None:
    """Raise OSError or ValueError unless the head of a cluster answers at HOST:PORT, ray://HOST:PORT or "auto"."""
    found = _found() if address == AUTO else address
    if address == AUTO and found in ("", AUTO):
        return  # Ray looks for processes of this machine, and finds none at once
    host, _, port = found.removeprefix(CLIENT).rpartition(":")
    if not host:
        raise ValueError("there is no port in it")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    # For a proxy the address would be of the outside.
    with grpc.insecure_channel(found.removeprefix(CLIENT), [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ALIVE)(b"", timeout=_PATIENCE)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code in _NOT_RAY and not (code == grpc.StatusCode.UNIMPLEMENTED and found.startswith(CLIENT)):
                raise ConnectionError(_NOT_RAY[code]) from None


def _found() -> str:
    """Return the address that "auto" stands for, as far as it is written down; "" if it is not."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    try:
        return str(import_module("ray._private.services").find_bootstrap_address(None) or "")
    except (ImportError, AttributeError, TypeError, OSError):  # of another release
        return ""
