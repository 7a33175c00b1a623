"""What is wrong is said in one sentence by the container that finds it: containers of the image with prepared folders."""

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from containers import built_image
from real_processes import quickbloom

from benchmarks.compose import IMAGE, ROOT, docker
from quickbloom.server_app.deployment.certificates import issue, load_certificate, load_key, pem

pytestmark = pytest.mark.docker

APP = 49999
SUPERLINK = ["quickbloom", "superlink", "--secrets", "/secrets", "--state", "/app/state", "--host", "0.0.0.0"]
SUPEREXEC = [
    "quickbloom",
    "superexec",
    "--secrets",
    "/secrets",
    "--superlink",
    "superlink:8000",
    "--runs",
    "/app/quickbloom-runs",
]
SUPERNODE = ["quickbloom-edge", "join", "--server", "superlink:9092", "--secrets", "/secrets"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> None:
    built_image(tmp_path_factory.mktemp("build"))


@pytest.fixture
def secrets(tmp_path: Path, image: None) -> Path:
    """Secrets of a federation whose SuperLink is called `superlink`."""
    done = quickbloom("secrets", "--output", "secrets", "--nodes", "1", "--host", "superlink", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "secrets"


@pytest.fixture
def network(image: None) -> Iterator[str]:
    docker("network", "create", "--internal", "quickbloom-test-bad")
    yield "quickbloom-test-bad"
    docker("rm", "--force", "quickbloom-test-superlink")
    docker("network", "rm", "quickbloom-test-bad")


def said(role: list[str], folder: Path, *options: str) -> str:
    """What a container of `role` with these secrets says before it ends with a failure: one sentence after `error:`."""
    done = docker("run", "--rm", "--init", "-v", f"{readable(folder)}:/secrets:ro", *options, IMAGE, *role)
    everything = done.stdout + done.stderr
    assert done.returncode in (1, 2), everything
    assert "Traceback" not in everything
    assert everything.count("error:") == 1, everything
    return everything.partition("error: ")[2]


def readable(folder: Path) -> Path:
    """The same folder for the user of the containers, where root can give it away; else for everybody."""
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if os.geteuid() == 0:
            os.chown(path, APP, APP)
    return folder


@pytest.mark.parametrize(("role", "missing"), [(SUPERLINK, "ca.crt"), (SUPEREXEC, "ca.crt"), (SUPERNODE, "ca.crt")])
def test_missing_secrets(tmp_path: Path, image: None, role: list[str], missing: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    sentence = said(role, empty)
    assert f"/secrets/{missing}" in sentence
    assert "quickbloom secrets" in sentence


def test_an_expired_certificate_is_told_by_the_superlink(secrets: Path) -> None:
    expire(secrets)
    sentence = said(SUPERLINK, secrets / "superlink")
    assert "expired" in sentence
    assert "--renew-server" in sentence


def test_an_expired_certificate_is_told_by_the_node(secrets: Path, network: str) -> None:
    expire(secrets)
    serve(secrets / "superlink", network)
    sentence = said(SUPERNODE, secrets / "nodes" / "node-1", "--network", network)
    assert "the certificate of superlink:9092 has expired" in sentence
    assert "--renew-server" in sentence


@pytest.mark.parametrize(("role", "folder"), [(SUPERNODE, "nodes/node-1"), (SUPEREXEC, "superexec")])
def test_the_ca_of_another_federation(secrets: Path, network: str, tmp_path: Path, role: list[str], folder: str) -> None:
    serve(secrets / "superlink", network)
    (tmp_path / "others").mkdir()
    others = quickbloom("secrets", "--output", "others/secrets", "--nodes", "1", cwd=tmp_path)
    assert others.returncode == 0, others.stderr
    sentence = said(role, tmp_path / "others" / "secrets" / folder, "--network", network)
    assert "was not made by the CA in '/secrets/ca.crt'" in sentence


def test_another_federations_ca_for_the_command_line(secrets: Path, network: str, tmp_path: Path) -> None:
    serve(secrets / "superlink", network, "superlink-control")
    others = quickbloom("secrets", "--output", "others", "--nodes", "1", cwd=tmp_path)
    assert others.returncode == 0, others.stderr
    command = ["quickbloom", "run", "--rounds", "1"]
    sentence = said(command, tmp_path / "others" / "cli", "--network", network)
    assert "the certificate of the SuperLink at superlink-control:8000 is not trusted" in sentence
    assert "`root-certificates` of the connection `superlink` must be the ca.crt of this federation" in sentence


def test_a_key_that_is_none(secrets: Path) -> None:
    key = secrets / "nodes" / "node-1" / "node.key"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n")
    assert "'/secrets/node.key' must be an elliptic-curve private key" in said(SUPERNODE, key.parent)


def test_the_key_of_another_certificate(secrets: Path, tmp_path: Path) -> None:
    others = quickbloom("secrets", "--output", "others", "--nodes", "1", cwd=tmp_path)
    assert others.returncode == 0, others.stderr
    shutil.copy(tmp_path / "others" / "superlink" / "server.key", secrets / "superlink" / "server.key")
    assert "does not belong to the certificate" in said(SUPERLINK, secrets / "superlink")


@pytest.mark.parametrize("port", [8000, 9092])
def test_a_port_that_is_in_use(secrets: Path, port: int) -> None:
    taken = f"import socket, subprocess, sys; s = socket.create_server(('', {port})); sys.exit(subprocess.call({SUPERLINK}))"
    sentence = said(["python", "-c", taken], secrets / "superlink")
    assert f"cannot listen on 0.0.0.0:{port} (Address already in use)" in sentence


def test_a_state_volume_that_cannot_be_written(secrets: Path) -> None:
    sentence = said(SUPERLINK, secrets / "superlink", "--tmpfs", "/app/state:ro")
    assert "'/app/state' must be one that user 49999 can write (Read-only file system)" in sentence


def test_a_directory_of_runs_that_cannot_be_written(secrets: Path) -> None:
    sentence = said(SUPEREXEC, secrets / "superexec", "--tmpfs", "/app/quickbloom-runs:ro")
    assert "'/app/quickbloom-runs' must be one that user 49999 can write (Read-only file system)" in sentence


def test_a_data_volume_that_cannot_be_written(secrets: Path) -> None:
    role = [*SUPERNODE, "--set", "state-dir=/app/data/state"]
    sentence = said(role, secrets / "nodes" / "node-1", "--tmpfs", "/app/data:ro")
    assert (
        "`state-dir` must be a directory that user 49999 can write, got '/app/data/state' (Read-only file system)" in sentence
    )


def expire(secrets: Path) -> None:
    """Put a certificate in place that ended yesterday, from the same CA."""
    ca, key = load_certificate(secrets / "ca" / "ca.crt"), load_key(secrets / "ca" / "ca.key")
    server_key, server = issue(key, ca, ["superlink"], 1, datetime.now(UTC) - timedelta(days=2))
    (secrets / "superlink" / "server.crt").write_bytes(pem(server))
    (secrets / "superlink" / "server.key").write_bytes(pem(server_key))


def serve(secrets: Path, network: str, name: str = "superlink") -> None:
    """A server with this certificate on the ports of a SuperLink, which is all that is looked at before it is refused."""
    program = ROOT / "tests" / "docker" / "tls_server.py"
    options = ["-v", f"{readable(secrets)}:/secrets:ro", "-v", f"{program}:/tls_server.py:ro"]
    started = docker(
        *("run", "--detach", "--name", "quickbloom-test-superlink", "--network", network, "--network-alias", name),
        *(*options, IMAGE, "python", "/tls_server.py"),
    )
    assert started.returncode == 0, started.stderr
