"""A SuperLink whose port does not open ends with the reason; one whose ports are open is left alone."""

import socket
import subprocess
import sys

import pytest

from quickbloom.common.flower import superlink
from quickbloom.server_app.launch.flower_run import free_port

WATCH = """
import sys, time
from quickbloom.common.flower.superlink import end_unless_open
end_unless_open(sys.argv[2:], patience=float(sys.argv[1]))
"""


def watch(patience: float, *addresses: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCH, str(patience), *addresses]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def open_port() -> object:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_does_not_open_ends_the_process_with_one_sentence(open_port: int) -> None:
    closed = f"127.0.0.1:{free_port()}"
    done = watch(1.0, f"0.0.0.0:{open_port}", closed)
    assert done.returncode == 1
    assert " ".join(done.stderr.split()) == (
        f"error: Flower's SuperLink did not open {closed} within 1 s, so nobody can connect there: read its log above, or "
        "choose another host or port"
    )


def test_open_ports_are_left_alone(open_port: int) -> None:
    done = watch(30.0, f"0.0.0.0:{open_port}", f"127.0.0.1:{open_port}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--host", "0.0.0.0", "--port", "8000", "--fleet-api-address", "[::]:9092", "--insecure"],
            ["0.0.0.0:8000", "[::]:9092"],
        ),
        (["--insecure", "--host=::1", "--port=1"], ["[::1]:1"]),
        (["--simulation"], []),
    ],
)
def test_addresses_are_those_of_the_command_line(arguments: list[str], expected: list[str]) -> None:
    assert superlink.addresses(arguments) == expected


LIMIT = """
import resource
from quickbloom.common.flower.superlink import allow_connections
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
allow_connections()
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most))
"""


def test_as_many_nodes_can_be_connected_as_the_system_allows() -> None:
    done = subprocess.run([sys.executable, "-c", LIMIT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "True\n"
