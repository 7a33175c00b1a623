"""A SuperLink of the user's Flower configuration: whether it exists, and why it cannot be asked, in one sentence."""

import io
import os
import ssl
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import click
import httpx

from quickbloom.common.errors import QuickbloomError, in_one_line
from quickbloom.common.flower import names


class SuperLinkError(QuickbloomError):
    """A SuperLink could not be asked, or did not accept a key."""


def connection_exists(name: str) -> bool:
    """Return whether the user's Flower configuration has the SuperLink connection `name`."""
    return connection_address(name) is not None


def connection_address(name: str) -> str | None:
    """Return HOST:PORT of the connection `name`; "" if it has none, None if there is no such connection."""
    path = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {})
    except (OSError, ValueError):  # of damaged TOML, or of text that is not UTF-8
        return None
    if name not in known:
        return None
    return str(known[name].get("address", "")) if isinstance(known[name], dict) else ""


def trouble(connection: str) -> str:
    """Return why the SuperLink of the user's `connection` cannot be asked, in one sentence; "" if it answers."""
    try:
        with translated(connection):
            settings = names.get("read_superlink_connection")(connection)
            with redirect_stdout(io.StringIO()):
                client = names.get("init_http_client_from_connection")(settings)
        try:
            with translated(connection, settings.address or ""):
                client.ListNodes(names.get("ListNodesRequest")())
        finally:
            client.close()
    except names.MissingNameError:  # of this Flower, whose own message must serve then
        return ""
    except SuperLinkError as error:
        return str(error)
    return ""


@contextmanager
def translated(connection: str, address: str = "") -> Iterator[None]:
    """Turn exceptions of Flower's client into one sentence."""
    link = f"the SuperLink at {address}"
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise SuperLinkError(_refusal(error.response, link)) from None
    except httpx.RequestError as error:
        reason = in_one_line(_root(error))
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise SuperLinkError(
                f"the certificate of {link} is not trusted ({_verdict(error)}): `root-certificates` of the connection "
                f"`{connection}` must be the ca.crt of this federation, and the certificate must name the host in `address`: "
                "`quickbloom secrets --renew-server --host HOST` makes a new one"
            ) from None
        if isinstance(_root(error), ssl.SSLError):
            raise SuperLinkError(
                f"{link} does not answer with TLS ({reason}): start it with its certificate and `--enable-supernode-auth`"
            ) from None
        raise SuperLinkError(
            f"{link} cannot be reached ({reason}): start it, or mend `address` of the connection `{connection}`"
        ) from None
    except click.exceptions.Exit:
        raise SuperLinkError(f"Flower refuses the connection `{connection}`: look with `flwr list {connection}`") from None
    except click.ClickException as error:
        raise SuperLinkError(
            f"Flower refuses the connection `{connection}`: {error.message}; mend it in Flower's config.toml"
        ) from None
    except names.get("FlowerError") as error:
        raise SuperLinkError(in_one_line(error)) from None
    except (ValueError, ssl.SSLError) as error:
        if address:
            raise SuperLinkError(
                f"{link} answers, but not as a SuperLink does ({in_one_line(error)}): mend `address` of the connection "
                f"`{connection}`"
            ) from None
        raise SuperLinkError(
            f"the connection `{connection}` of Flower's config.toml cannot be used ({in_one_line(error)}): mend its "
            "`address` and `root-certificates`"
        ) from None


def _refusal(response: httpx.Response, link: str) -> str:
    """Return why a SuperLink answered with an error."""
    known = names.get("FlowerError").from_json(response.text)
    if known is not None and known.code == names.get("ApiErrorCode").PUBLIC_KEY_ALREADY_IN_USE:
        return f"{link} has this key already under another account: unregister it there, or make another key with `--add-node`"
    if known is not None:
        return f"{link} did not take the key (code {known.code}): {known.message}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return f"{link} asks for an account: log in with `flwr login`"
    return f"{link} answered with HTTP status {response.status_code}: its `address` must be that of the SuperLink's HTTP port"


def _root(error: BaseException) -> BaseException:
    """Return the original exception: httpx wraps those of the system."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _verdict(error: BaseException) -> str:
    root = _root(error)
    return root.verify_message.rstrip(".") if isinstance(root, ssl.SSLCertVerificationError) else in_one_line(root)
