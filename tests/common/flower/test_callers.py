"""Who may talk to the HTTP ports of Flower's processes on loopback."""

import inspect
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_processes import process, wait_for

from quickbloom.common.flower import callers, workers
from quickbloom.server_app.launch.flower_run import LocalSuperLink, environment, free_port

REFUSED = ("nothing", "refused")
REQUEST = b"POST /any HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
linux = pytest.mark.skipif(not callers.can_tell(), reason="needs /proc/net/tcp")


_AS_ANOTHER = """
import os, socket, sys
port, family, host, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.setgroups([]), os.setgid(65534), os.setuid(65534)
{ask}
try:
    print(ask(port, family, host, how=how)[:12].decode() or "nothing")
except OSError:
    print("refused")
"""


def as_another(port: int, family: int = socket.AF_INET, host: str = "127.0.0.1", how: str = "") -> str:
    """How the answer to `ask` begins if user 65534 asks: "nothing", "refused" or "closed"."""
    # Another user may not be able to start this Python: it becomes that user once it runs.
    code = _AS_ANOTHER.format(ask=f"REQUEST = {REQUEST!r}\n" + inspect.getsource(ask))
    command = [sys.executable, "-S", "-c", code, str(port), str(int(family)), host, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def ask(port: int, family: int = socket.AF_INET, host: str = "127.0.0.1", *, how: str = "") -> bytes:
    """The answer to REQUEST. `how`: "close" or "shut" the connection as soon as it is sent."""
    with socket.socket(family) as client:
        client.settimeout(10)
        client.connect((host, port))
        client.sendall(REQUEST)
        if how == "close":
            return b"closed"
        if how == "shut":
            client.shutdown(socket.SHUT_WR)
        answer = b""
        while more := client.recv(4096):
            answer += more
        return answer


_SERVER = """
import sys, uvicorn
from quickbloom.common.flower import callers
callers.guard()
async def app(scope, receive, send):
    print(scope["path"], flush=True)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
uvicorn.run(app, port=int(sys.argv[1]), http=sys.argv[2], lifespan="off", log_level="critical")
"""


@pytest.fixture(params=["httptools", "h11"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of a guarded server on loopback, and the file of the paths that were asked of it."""
    port, seen = free_port(), tmp_path / "seen"
    with process(sys.executable, "-c", _SERVER, str(port), request.param, env=dict(os.environ), log=seen):
        wait_for_a_listener(port)
        yield port, seen


def wait_for_a_listener(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_user_who_serves_is_answered(served: tuple[int, Path]) -> None:
    port, seen = served
    assert ask(port).startswith(b"HTTP/1.1 204")
    assert ask(port, socket.AF_INET6, "::ffff:127.0.0.1").startswith(b"HTTP/1.1 204")
    assert seen.read_text() == "/any\n/any\n"


@needs_root
@linux
@pytest.mark.parametrize("how", ["", "close", "shut"])
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::ffff:127.0.0.1")])
def test_nothing_that_another_user_sends_is_read(served: tuple[int, Path], family: int, host: str, how: str) -> None:
    port, seen = served
    for _ in range(5):
        assert as_another(port, family, host, how) in (*REFUSED, "closed")
    assert ask(port).startswith(b"HTTP/1.1 204")  # and the server goes on
    assert seen.read_text() == "/any\n"


@needs_root
@linux
def test_root_is_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        with client:
            served, caller = listening.accept()
            with served:
                assert callers.owner_of(caller, served.getsockname()) == 0
                assert callers.may_talk(caller, served.getsockname())
                monkeypatch.setattr(os, "geteuid", lambda: 1000)
                assert not callers.may_talk(caller, served.getsockname())
                client.close()
                assert callers.owner_of(caller, served.getsockname()) is None


@linux
def test_a_port_for_other_machines_is_left_alone() -> None:
    assert callers.may_talk(("203.0.113.7", 50000), ("203.0.113.5", 8000))
    assert not callers.may_talk(("127.0.0.1", 1), ("127.0.0.1", 2))  # a connection that is not there


def test_an_address_is_read_as_the_kernel_writes_it() -> None:
    if sys.byteorder != "little":
        pytest.skip("the addresses were written down on a little-endian machine")
    assert callers._address("0100007F:1F90") == ("127.0.0.1", 0x1F90)
    assert callers._address("00000000000000000000000001000000:0016") == ("::1", 22)
    assert callers._address("0000000000000000FFFF00000100007F:0050") == ("127.0.0.1", 80)


@needs_root
@linux
@pytest.mark.simulation
def test_a_simulations_superlink_answers_nobody_else() -> None:
    with LocalSuperLink() as link:
        (line,) = [line for line in (link.home / "config.toml").read_text().splitlines() if "address" in line]
        port = int(line.strip('"').rpartition(":")[2])
        assert ask(port)
        assert as_another(port) in REFUSED
        assert link.home.stat().st_mode & 0o077 == 0
        assert (link.home / "ray.token").stat().st_mode & 0o077 == 0


@needs_root
@linux
@pytest.mark.simulation
def test_a_supernode_answers_nobody_else(tmp_path: Path) -> None:
    port, fleet, own = free_port(), free_port(), free_port()
    env = environment(tmp_path)
    link: list[str | Path] = [Path(sys.executable).parent / "flower-superlink", "--insecure", "--port", str(port)]
    link += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]
    node = workers.command("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{fleet}", "--port", str(own))
    with process(*link, env=env, log=tmp_path / "link.log"):
        wait_for(port)
        with process(*node, env=env, log=tmp_path / "node.log"):
            wait_for(own)
            assert b"HTTP/1.1" in ask(own)
            assert as_another(own) in REFUSED


def _listening() -> dict[int, str]:
    """Inode -> address in hexadecimal of every listening socket."""
    lines = [line.split() for table in callers.TABLES if table.exists() for line in table.read_text().splitlines()[1:]]
    return {int(words[9]): words[1] for words in lines if words[3] == "0A"}


def _sockets_of(pid: int) -> set[int]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            name = str(entry.readlink())
        except OSError:
            continue
        if name.startswith("socket:["):
            found.add(int(name[8:-1]))
    return found


_WITHOUT_TOKEN = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"fun", timeout=5))
except AuthenticationError:
    print("refused")
"""


@pytest.mark.slow
@linux
@pytest.mark.simulation
def test_every_port_of_a_simulation_is_on_loopback_and_ray_wants_its_secret(tmp_path: Path) -> None:
    from quickbloom.common.system.processes import processes_with, session_of, sessions_with

    env = {**environment(), "QUICKBLOOM_TEST_MARK": str(tmp_path)}
    command: list[str | Path] = [
        Path(sys.executable).parent / "quickbloom",
        "run",
        "--runtime",
        "simulation",
        "--rounds",
        "5000",
        "--set",
        "evaluate-every=1",
    ]
    mark = f"QUICKBLOOM_TEST_MARK={tmp_path}"
    with process(*command, env=env, log=tmp_path / "run.log"):
        deadline = time.monotonic() + 120
        while "round" not in (tmp_path / "run.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        sessions = sessions_with(mark)
        pids = {int(entry.name) for entry in Path("/proc").glob("[0-9]*") if session_of(int(entry.name)) in sessions}
        pids |= set(processes_with(mark))
        listening = _listening()
        ports: dict[int, str] = {}
        gcs = 0
        for pid in pids:
            for inode in _sockets_of(pid) & listening.keys():
                address = callers._address(listening[inode])
                ports[address[1]] = address[0]
                if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]:
                    gcs = address[1]
        assert len(ports) > 4
        assert set(ports.values()) == {"127.0.0.1"}
        asked = [sys.executable, "-c", _WITHOUT_TOKEN, f"127.0.0.1:{gcs}"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False, env=environment())
        assert done.stdout.strip() == "refused", done.stderr
        if os.geteuid() == 0:  # of the HTTP servers among them none gives another user what he asks for
            answers = {as_another(port) for port in ports}
            assert not any(answer.startswith("HTTP/1.1 2") for answer in answers), answers
