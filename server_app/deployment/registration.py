"""Making the public keys of nodes known to a SuperLink: `quickbloom secrets --register`.

Through Flower's own client of the Control API, not through `flwr supernode register`: that command calls every failure of the
connection "unavailable", starts anew for each key, and cannot tell a key that is registered from one that was unregistered.
"""

import io
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import click
import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from quickbloom.common.errors import QuickbloomError, in_one_line
from quickbloom.common.flower import names
from quickbloom.common.system.loopback import check_socks


class RegistrationError(QuickbloomError):
    """The SuperLink could not be asked, or did not take a key."""


def register(connection: str, keys: Mapping[str, Path]) -> Iterator[str]:
    """Register nodes with the SuperLink of the user's `connection`; yields a line for each as it is done.

    `keys`: the file with the public key of each node, by the node's name. A key that is registered already is said and left.
    Raises ConfigError for a proxy that cannot be used, and RegistrationError at the first failure of the connection and at the
    end if a key was refused.
    """
    public = {name: _as_pem(path) for name, path in keys.items()}
    refused = []
    with _translated(connection):
        settings = names.get("read_superlink_connection")(connection)
        if settings.insecure:
            raise RegistrationError(
                f"the connection `{connection}` has `insecure = true`, and nodes are authenticated over TLS alone: start the "
                'SuperLink with its certificate and `--enable-supernode-auth`, and put `root-certificates = "/path/to/ca.crt"` '
                "in place of `insecure`"
            )
        if not settings.address or settings.address.startswith(":"):
            raise RegistrationError(f"the connection `{connection}` must have the `address` of a SuperLink, such as HOST:8000")
        check_socks(settings.address)
        with redirect_stdout(io.StringIO()):  # Flower says which connection it uses
            client = names.get("init_http_client_from_connection")(settings)
    try:
        with _translated(connection, settings.address):
            known = {node.public_key: node for node in client.ListNodes(names.get("ListNodesRequest")()).nodes_info}
        for name, key in public.items():
            if key not in known:
                with _translated(connection, settings.address):
                    node_id = client.RegisterNode(names.get("RegisterNodeRequest")(public_key=key, name=name)).node_id
                yield f"{name}: registered as node {node_id}"
            elif known[key].status == "unregistered":
                refused.append(name)
            else:
                yield f"{name}: already registered as node {known[key].node_id}"
    finally:
        client.close()
    if refused:
        raise RegistrationError(
            f"the SuperLink takes no key again that was unregistered, as was that of {', '.join(refused)}: remove the folder "
            "of the node, or give its device a key under a new name with `--add-node`"
        )


def trouble(connection: str) -> str:
    """Why the SuperLink of the user's `connection` cannot be asked, in one sentence; "" if it answers."""
    try:
        with _translated(connection):
            settings = names.get("read_superlink_connection")(connection)
            with redirect_stdout(io.StringIO()):
                client = names.get("init_http_client_from_connection")(settings)
        try:
            with _translated(connection, settings.address or ""):
                client.ListNodes(names.get("ListNodesRequest")())
        finally:
            client.close()
    except names.MissingNameError:  # of this Flower, whose own words must do then
        return ""
    except RegistrationError as error:
        return str(error)
    return ""


def _as_pem(path: Path) -> bytes:
    """The public key as the SuperLink keeps it."""
    try:
        return load_ssh_public_key(path.read_bytes()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    except OSError as error:
        raise RegistrationError(f"the public key '{path}' cannot be read ({error.strerror}): restore it") from None
    except (ValueError, UnsupportedAlgorithm):
        raise RegistrationError(f"'{path}' must be a public key in OpenSSH's format: write it with ssh-keygen -y") from None


@contextmanager
def _translated(connection: str, address: str = "") -> Iterator[None]:
    """Turn what Flower's client raises into one sentence."""
    link = f"the SuperLink at {address}"
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise RegistrationError(_refusal(error.response, link)) from None
    except httpx.RequestError as error:
        reason = in_one_line(_root(error))
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise RegistrationError(
                f"the certificate of {link} is not trusted ({_verdict(error)}): `root-certificates` of the connection "
                f"`{connection}` must be the ca.crt of this federation, and the certificate must name the host in `address`: "
                "`quickbloom secrets --renew-server --host HOST` makes a new one"
            ) from None
        if isinstance(_root(error), ssl.SSLError):
            raise RegistrationError(
                f"{link} does not answer with TLS ({reason}): start it with its certificate and `--enable-supernode-auth`"
            ) from None
        raise RegistrationError(
            f"{link} cannot be reached ({reason}): start it, or mend `address` of the connection `{connection}`"
        ) from None
    except click.exceptions.Exit:
        raise RegistrationError(f"Flower refuses the connection `{connection}`: look with `flwr list {connection}`") from None
    except click.ClickException as error:
        raise RegistrationError(
            f"Flower refuses the connection `{connection}`: {error.message}; mend it in Flower's config.toml"
        ) from None
    except names.get("FlowerError") as error:
        raise RegistrationError(in_one_line(error)) from None
    except (ValueError, ssl.SSLError) as error:
        if address:
            raise RegistrationError(
                f"{link} answers, but not as a SuperLink does ({in_one_line(error)}): mend `address` of the connection "
                f"`{connection}`"
            ) from None
        raise RegistrationError(
            f"the connection `{connection}` of Flower's config.toml cannot be used ({in_one_line(error)}): mend its "
            "`address` and `root-certificates`"
        ) from None


def _refusal(response: httpx.Response, link: str) -> str:
    """Why a SuperLink answered with an error."""
    known = names.get("FlowerError").from_json(response.text)
    if known is not None and known.code == names.get("ApiErrorCode").PUBLIC_KEY_ALREADY_IN_USE:
        return f"{link} has this key already under another account: unregister it there, or make another key with `--add-node`"
    if known is not None:
        return f"{link} did not take the key (code {known.code}): {known.message}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{link} asks for an account: log in with `flwr login`"
    return f"{link} answered with HTTP status {response.status_code}: its `address` must be that of the SuperLink's HTTP port"


def _root(error: BaseException) -> BaseException:
    """The exception that all began with: httpx wraps those of the system."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _verdict(error: BaseException) -> str:
    root = _root(error)
    return root.verify_message.rstrip(".") if isinstance(root, ssl.SSLCertVerificationError) else in_one_line(root)
