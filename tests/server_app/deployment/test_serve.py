"""What `quickbloom superlink` and `quickbloom superexec` refuse before Flower starts."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.deployment.secrets import create
from quickbloom.server_app.deployment.serve import ServeError, superexec, superlink
from quickbloom.server_app.launch.flower_run import free_port


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    create(tmp_path / "secrets", ["node-1"], [], days=1)
    return tmp_path / "secrets"


@contextmanager
def tls_server(secrets: Path) -> Iterator[int]:
    """A port of loopback that shakes hands once with these secrets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secrets / "superlink" / "server.crt", secrets / "superlink" / "server.key")

    def shake_hands() -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            context.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=shake_hands)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def test_a_superlink_says_which_port_is_taken(secrets: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"^cannot listen on 127.0.0.1:{port} \(Address already in use\): .* free it$"):
            superlink(secrets / "superlink", tmp_path / "state", "127.0.0.1", free_port(), "127.0.0.1", port)


def test_a_superlink_without_its_secret_says_so(secrets: Path, tmp_path: Path) -> None:
    (secrets / "superlink" / "superexec.secret").unlink()
    with pytest.raises(ServeError, match=r"^the file '.*superexec.secret' is missing: make it with `quickbloom secrets`"):
        superlink(secrets / "superlink", tmp_path / "state", "127.0.0.1", free_port(), "127.0.0.1", free_port())


def test_a_state_directory_that_is_a_file_is_refused(secrets: Path, tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(ServeError, match=r"^the directory '.*state' must be one that user \d+ can write \(File exists\)"):
        superlink(secrets / "superlink", tmp_path / "state", "127.0.0.1", free_port(), "127.0.0.1", free_port())


def test_a_superexec_does_not_trust_another_federations_superlink(secrets: Path, tmp_path: Path) -> None:
    create(tmp_path / "others", ["node-1"], [], days=1)
    with (
        tls_server(tmp_path / "others") as port,
        pytest.raises(
            ServeError, match=rf"^the certificate of 127.0.0.1:{port} was not made by the CA in '.*superexec/ca.crt'"
        ),
    ):
        superexec(secrets / "superexec", f"127.0.0.1:{port}", tmp_path / "runs")


def test_no_option_of_the_command_is_refused_by_a_flower_with_one_port(
    secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("quickbloom.common.flower.transport.spoken", lambda: "HTTP")
    monkeypatch.setattr("os.execve", lambda path, command, env: started.append(command))
    words = [
        "superlink",
        "--secrets",
        str(secrets / "superlink"),
        "--state",
        str(tmp_path / "state"),
        "--port",
        str(free_port()),
    ]
    done = CliRunner().invoke(cli, words)
    assert done.exception is None
    assert "--fleet-api-address" not in started[0]
    assert isinstance(CliRunner().invoke(cli, [*words, "--fleet-port", "9092"]).exception, ServeError)
