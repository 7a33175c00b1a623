"""Registers the public keys of nodes with a SuperLink: `quickbloom secrets --register`.

It uses Flower's own client of the Control API, not `flwr supernode register`: that command calls
every failure of the connection "unavailable", starts anew for each key, and cannot distinguish a
registered key from an unregistered one.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from quickbloom.common.flower import names
from quickbloom.common.system.loopback import check_socks
from quickbloom.server_app.launch.connection import SuperLinkError, translated


def register(connection: str, keys: Mapping[str, Path]) -> Iterator[str]:
    """Register nodes with the SuperLink of the user's `connection`; yield a line for each as it is done.

    `keys`: the file with the public key of each node, by the node's name. A key that is registered
    already is reported and left. Raises ConfigError for an unusable proxy, and SuperLinkError at
    the first failure of the connection, and at the end if a key was refused.
    """
    public = {name: _as_pem(path) for name, path in keys.items()}
    refused = []
    client, address = _client(connection)
    try:
        with translated(connection, address):
            known = {node.public_key: node for node in client.ListNodes(names.get("ListNodesRequest")()).nodes_info}
        for name, key in public.items():
            if key not in known:
                with translated(connection, address):
                    node_id = client.RegisterNode(names.get("RegisterNodeRequest")(public_key=key, name=name)).node_id
                yield f"{name}: registered as node {node_id}"
            elif known[key].status == "unregistered":
                refused.append(name)
            else:
                yield f"{name}: already registered as node {known[key].node_id}"
    finally:
        client.close()
    if refused:
        raise SuperLinkError(
            f"the SuperLink takes no key again that was unregistered, as was that of {', '.join(refused)}: remove the folder "
            "of the node, or give its device a key under a new name with `--add-node`"
        )


def listed(connection: str) -> list[dict[str, str]]:
    """Return what the SuperLink of a connection says of every registered node; times as ISO 8601, "" where there was none.

    Raises as `register` does.
    """
    client, address = _client(connection)
    try:
        with translated(connection, address):
            found = client.ListNodes(names.get("ListNodesRequest")()).nodes_info
    finally:
        client.close()
    return [
        {
            "id": str(node.node_id),
            "status": node.status,
            "activated": str(node.last_activated_at or ""),
            "until": str(node.online_until or ""),
        }
        for node in found
    ]


def _client(connection: str) -> tuple[Any, str]:
    """Return Flower's client of the Control API, and the address of the SuperLink. Raises as `register` does."""
    with translated(connection):
        settings = names.get("read_superlink_connection")(connection)
        if settings.insecure:
            raise SuperLinkError(
                f"the connection `{connection}` has `insecure = true`, and nodes are authenticated over TLS alone: start the "
                'SuperLink with its certificate and `--enable-supernode-auth`, and put `root-certificates = "/path/to/ca.crt"` '
                "in place of `insecure`"
            )
        if not settings.address or settings.address.startswith(":"):
            raise SuperLinkError(f"the connection `{connection}` must have the `address` of a SuperLink, such as HOST:8000")
        check_socks(settings.address)
        with redirect_stdout(io.StringIO()):  # Flower prints which connection it uses
            return names.get("init_http_client_from_connection")(settings), str(settings.address)


def _as_pem(path: Path) -> bytes:
    """Return the public key as the SuperLink stores it."""
    try:
        return load_ssh_public_key(path.read_bytes()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    except OSError as error:
        raise SuperLinkError(f"the public key '{path}' cannot be read ({error.strerror}): restore it") from None
    except (ValueError, UnsupportedAlgorithm):
        raise SuperLinkError(f"'{path}' must be a public key in OpenSSH's format: write it with ssh-keygen -y") from None
