"""Why nodes cannot be registered, in one sentence: Flower's real client against wrong servers on loopback."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tomli_w
from flwr.proto.control_pb2 import ListNodesResponse

from quickbloom.server_app.deployment import secrets as making
from quickbloom.server_app.deployment.registration import register
from quickbloom.server_app.launch.connection import SuperLinkError, trouble
from quickbloom.server_app.launch.flower_run import free_port


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("registration") / "secrets"
    making.create(output, ["a"], [], 30)
    return output


class _Refuses(BaseHTTPRequestHandler):
    status, body = 500, b""

    def do_POST(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@contextmanager
def server(certified: Path | None, status: int = 500, body: bytes = b"", address: str = "127.0.0.1") -> Iterator[int]:
    """The port of an HTTP server that refuses everything; with TLS from the `superlink` folder of `certified`."""
    handler = type("Refuses", (_Refuses,), {"status": status, "body": body})
    http = HTTPServer((address, 0), handler)
    http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hangs up is what is tested
    if certified:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certified / "superlink" / "server.crt", certified / "superlink" / "server.key")
        http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield http.server_port
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def refusal(home: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path, **connection: str | bool) -> str:
    """Why registering over this connection fails."""
    monkeypatch.setenv("FLWR_HOME", str(home))
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"link": connection}}))
    with pytest.raises(SuperLinkError) as error:
        list(register("link", making.public_keys(secrets)))
    return str(error.value)


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path) -> None:
    address, ca = f"127.0.0.1:{free_port()}", str(secrets / "cli" / "ca.crt")
    said = refusal(tmp_path, monkeypatch, secrets, address=address, **{"root-certificates": ca})
    assert said.startswith(
        f"the SuperLink at {address} cannot be reached (ConnectionRefusedError: [Errno 111] Connection refused)"
    )


def test_the_server_is_of_another_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path) -> None:
    making.create(tmp_path / "other", [], [], 30)
    with server(tmp_path / "other") as port:
        ca = str(secrets / "cli" / "ca.crt")
        said = refusal(tmp_path, monkeypatch, secrets, address=f"127.0.0.1:{port}", **{"root-certificates": ca})
    assert f"the certificate of the SuperLink at 127.0.0.1:{port} is not trusted (unable to get local issuer" in said


def test_the_certificate_does_not_name_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path) -> None:
    with server(secrets, address="127.0.0.2") as port:
        ca = str(secrets / "cli" / "ca.crt")
        said = refusal(tmp_path, monkeypatch, secrets, address=f"127.0.0.2:{port}", **{"root-certificates": ca})
    assert "is not trusted (IP address mismatch, certificate is not valid for '127.0.0.2')" in said


def test_the_server_speaks_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path) -> None:
    with server(None) as port:
        ca = str(secrets / "cli" / "ca.crt")
        said = refusal(tmp_path, monkeypatch, secrets, address=f"127.0.0.1:{port}", **{"root-certificates": ca})
    assert "does not answer with TLS" in said


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (404, b"", "answered with HTTP status 404: its `address` must be that of the SuperLink's HTTP port"),
        (401, b"", "asks for an account: log in with `flwr login`"),
        (
            200,
            b"<html>",
            "answers, but not as a SuperLink does (ValueError: Invalid protobuf response payload): mend `address`",
        ),
    ],
)
def test_something_else_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path, status: int, body: bytes, sentence: str
) -> None:
    with server(secrets, status, body) as port:
        ca = str(secrets / "cli" / "ca.crt")
        said = refusal(tmp_path, monkeypatch, secrets, address=f"127.0.0.1:{port}", **{"root-certificates": ca})
    assert sentence in said


def test_a_connection_without_tls_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path
) -> None:
    said = refusal(tmp_path, monkeypatch, secrets, address="127.0.0.1:1", insecure=True)
    assert said.startswith("the connection `link` has `insecure = true`, and nodes are authenticated over TLS alone")


def test_a_connection_to_flowers_own_simulation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path
) -> None:
    assert "must have the `address` of a SuperLink" in refusal(tmp_path, monkeypatch, secrets, address=":local:")


def test_root_certificates_that_are_none_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path) -> None:
    for wrong in (secrets / "ca" / "ca.key", tmp_path / "none", tmp_path):
        said = refusal(tmp_path, monkeypatch, secrets, address="127.0.0.1:1", **{"root-certificates": str(wrong)})
        assert "root-certificates" in said or f"`{wrong}`" in said
        assert len(said.splitlines()) == 1


def test_a_public_key_in_another_format_is_told(secrets: Path, tmp_path: Path) -> None:
    with pytest.raises(SuperLinkError, match="must be a public key in OpenSSH's format"):
        list(register("link", {"a": secrets / "ca" / "ca.crt"}))
    with pytest.raises(SuperLinkError, match=r"cannot be read \(No such file or directory\)"):
        list(register("link", {"a": tmp_path / "none"}))


def test_before_a_run_the_same_is_said_of_a_connection_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path
) -> None:
    making.create(tmp_path / "other", [], [], 30)
    with server(secrets) as port:
        for ca, sentence in (
            (tmp_path / "other" / "cli" / "ca.crt", f"the certificate of the SuperLink at 127.0.0.1:{port} is not trusted"),
            (tmp_path / "none.crt", "Flower refuses the connection `link`: Failed to read certificate file"),
        ):
            settings = {"address": f"127.0.0.1:{port}", "root-certificates": str(ca)}
            monkeypatch.setenv("FLWR_HOME", str(tmp_path))
            (tmp_path / "config.toml").write_text(tomli_w.dumps({"superlink": {"link": settings}}))
            assert trouble("link").startswith(sentence)


def test_nothing_is_said_of_a_connection_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secrets: Path) -> None:
    with server(secrets, status=200, body=ListNodesResponse().SerializeToString()) as port:
        settings = {"address": f"127.0.0.1:{port}", "root-certificates": str(secrets / "cli" / "ca.crt")}
        monkeypatch.setenv("FLWR_HOME", str(tmp_path))
        (tmp_path / "config.toml").write_text(tomli_w.dumps({"superlink": {"link": settings}}))
        assert trouble("link") == ""
