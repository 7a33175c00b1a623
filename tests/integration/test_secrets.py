"""A real SuperLink with TLS and node authentication, and a real SuperNode, with the files that `quickbloom secrets` makes."""

import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import tomli_w
from real_processes import SCRIPTS, process, quickbloom

from quickbloom.server_app.deployment.secrets import add_nodes, create
from quickbloom.server_app.deployment.upgrading import moment
from quickbloom.server_app.launch.flower_run import environment, free_port

pytestmark = pytest.mark.grpc


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list[str]]]:
    """A directory with `secrets`, whose two nodes are registered, the port of the Fleet API, and the two nodes' ids.

    The connection `loopback` leads to the SuperLink; its log is superlink.log there.
    """
    home = tmp_path_factory.mktemp("federation")
    create(home / "secrets", ["node-1", "node-2"], [], days=1)
    ca = home / "secrets" / "cli" / "ca.crt"
    http, fleet = free_port(), free_port()
    connection = {"address": f"127.0.0.1:{http}", "root-certificates": str(ca)}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"loopback": connection}}))
    files = home / "secrets" / "superlink"
    link: list[str | Path] = [
        SCRIPTS / "flower-superlink",
        "--host",
        "127.0.0.1",
        "--port",
        str(http),
        "--enable-supernode-auth",
    ]
    link += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]
    link += [
        "--ssl-ca-certfile",
        files / "ca.crt",
        "--ssl-certfile",
        files / "server.crt",
        "--ssl-keyfile",
        files / "server.key",
    ]
    with process(*link, env=environment(home), log=home / "superlink.log"):
        _until(lambda: _healthy(http, ca))
        done = quickbloom("secrets", "--register", "loopback", cwd=home, flwr_home=home)
        assert done.returncode == 0, done.stderr
        lines = [line.split(" as node ") for line in done.stdout.splitlines()]
        assert [said for said, _ in lines] == ["node-1: registered", "node-2: registered"]
        yield home, fleet, [node_id for _, node_id in lines]


def test_a_registered_node_comes_online_and_another_one_is_refused(federation: tuple[Path, int, list[str]]) -> None:
    home, fleet, (first, second) = federation
    add_nodes(home / "secrets", ["stranger"])
    try:
        with _node(home, fleet, "node-2"), _node(home, fleet, "stranger") as stranger:
            _until(lambda: f"Activated node_id={second}" in (home / "superlink.log").read_text())
            listed = json.loads(_flwr(home, "list", "loopback", "--format", "json"))["nodes"]
            assert {node["node-id"]: node["status"] for node in listed} == {first: "registered", second: "online"}
            # What `quickbloom deploy upgrade` waits by: when it connected, and until when it counts as online.
            seen = {node["id"]: node for node in json.loads(_listed(home))}
            assert (seen[first]["status"], seen[first]["activated"], seen[first]["until"]) == ("registered", "", "")
            assert time.time() - 300 < moment(seen[second]["activated"]) <= time.time() < moment(seen[second]["until"])
            assert stranger.wait(60) != 0
        assert "[code: 2004] Failed to activate SuperNode" in (home / "stranger.log").read_text()
    finally:
        (home / "secrets" / "nodes" / "stranger").rename(home / "stranger")


def test_registering_again_is_no_error_but_a_key_that_was_unregistered_is(federation: tuple[Path, int, list[str]]) -> None:
    home, _, (first, second) = federation
    again = quickbloom("secrets", "--register", "loopback", cwd=home, flwr_home=home)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"node-1: already registered as node {first}\nnode-2: already registered as node {second}\n"
    _flwr(home, "unregister", first, "loopback")
    refused = quickbloom("secrets", "--register", "loopback", cwd=home, flwr_home=home)
    assert refused.returncode == 1
    assert refused.stdout == f"node-2: already registered as node {second}\n"
    assert "takes no key again that was unregistered, as was that of node-1: remove the folder" in refused.stderr


def _node(home: Path, fleet: int, name: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    files = home / "secrets" / "nodes" / name
    command: list[str | Path] = [SCRIPTS / "flower-supernode", "--superlink", f"127.0.0.1:{fleet}", "--port", str(free_port())]
    command += ["--root-certificates", files / "ca.crt", "--auth-supernode-private-key", files / "node.key"]
    return process(*command, env=environment(home), log=home / f"{name}.log")


def _flwr(home: Path, *arguments: str) -> str:
    """What Flower's own command for nodes prints."""
    command = [str(SCRIPTS / "flwr"), "supernode", *arguments]
    done = subprocess.run(
        command, env=environment(home), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _listed(home: Path) -> str:
    """What the containers' own look at the nodes prints, by another connection."""
    code = (
        "import json; from quickbloom.server_app.deployment.registration import listed; print(json.dumps(listed('loopback')))"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=60, check=True).stdout


def _healthy(port: int, ca: Path) -> bool:
    try:
        with urlopen(
            f"https://localhost:{port}/health", timeout=1, context=ssl.create_default_context(cafile=str(ca))
        ) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline, "not within 60 s"
        time.sleep(0.2)
